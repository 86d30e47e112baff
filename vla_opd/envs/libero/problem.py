"""LIBERO's own environment class with a repeatable reset and single steps.

Imported only by `env.LiberoEnv`, in the process that owns the simulator: this module imports
robosuite at the top.

All functions keep the stock order of MuJoCo calls, however odd it looks: the solver's warm start
depends on it in the last bits.
"""

# robosuite keeps the necessary attributes private, and draws from numpy's global generator.
# ruff: noqa: SLF001, NPY002
# pyright: basic, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportUninitializedInstanceVariable=false

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import robosuite
from jaxtyping import Float64
from libero.libero.envs import TASK_MAPPING
from libero.libero.envs.bddl_utils import get_problem_info
from robosuite.utils.binding_utils import MjSim
from robosuite.utils.errors import RandomizationError

from vla_opd.envs.libero.arm import Arm

SUBSTEPS = 25
JOINT_NOISE = 0.02
"""Standard deviation of each arm joint about the rest posture, in rad.

robosuite's default, which matches the 50 fixed states of every task.
"""

_PLACEMENT_ATTEMPTS = 1000
_NEVER_CHANGED = (
    "tex_",
    "mesh_",
    "bvh_",
    "oct_",
    "hfield_",
    "skin_",
    "names",
    "name_",
    "paths",
    "text_",
)


class Simulation(MjSim):
    """robosuite's simulation, with a reset that also restores the model.

    robosuite and LIBERO move fixtures by editing the model.
    current: the stage up to which the state has been propagated; a forward pass leaves that out.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        super().__init__(model)
        self._pristine = {name: array.copy() for name, array in _editable_arrays(model)}
        self.current = mujoco.mjtStage.mjSTAGE_NONE

    def reset(self) -> None:
        """Do a hard reset without compiling the model again.

        Restores the state and the model as created, then makes two forward passes.
        """
        model = self.model._model
        for name, array in self._pristine.items():
            getattr(model, name)[...] = array
        mujoco.mj_resetData(model, self.data._data)
        self.forward()
        self.forward()  # the stock render context makes one more when it is created

    def forward(self) -> None:
        """Make what is left of a forward pass."""
        if self.current != mujoco.mjtStage.mjSTAGE_ACC:
            mujoco.mj_forwardSkip(self.model._model, self.data._data, self.current, False)


class Problem:
    """Mixin before a LIBERO problem class, which stays the one that the BDDL file names.

    Attributes used from outside: `sim`, `robots`, `parsed_problem`, `object_states_dict`,
    `obj_of_interest`, `view_substep`.
    """

    def __init__(self, bddl: Path, compile_model: Callable[[str], mujoco.MjModel]) -> None:
        self._compile_model = compile_model
        self._is_built = False
        self.view_substep = SUBSTEPS
        super().__init__(  # the mixin's super() is the LIBERO class
            str(bddl),
            robots=["Panda"],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,  # set by `restart`
            use_camera_obs=False,
            has_offscreen_renderer=False,
            ignore_done=True,
            hard_reset=False,
        )
        self._is_built = True

    def _load_model(self) -> None:
        self.object_property_initializers: list[Any] = []
        super()._load_model()
        # A stock environment has loaded its model twice by the end of its first reset, and then
        # samples every drawer twice.
        self.object_property_initializers *= 2

    def _initialize_sim(self, xml_string: str | None = None) -> None:
        assert xml_string is None
        xml = self.model.get_xml()
        self.sim = Simulation(self._compile_model(xml))
        self.initialize_time(self.control_freq)

    def _setup_observables(self) -> OrderedDict[str, Any]:
        return OrderedDict()  # sensors are read with a frame, not 25 times per control step

    def _reset_internal(self) -> None:
        if self._is_built:  # the stock constructor resets, and then the caller does
            gripper = self.robots[0].gripper
            # A hard reset would make a new gripper.
            gripper.current_action = np.zeros(gripper.dof)
            super()._reset_internal()

    def restart(self, seed: int, state: Float64[np.ndarray, "D"] | None) -> None:
        """Reset to placements drawn from `seed`, then to the fixed initial `state` if given.

        state: time, qpos and qvel in a row.

        Without a state the arm starts from its rest posture with `JOINT_NOISE`. The benchmark's
        fixed states contain such noise, so none is added to them: the controller keeps the posture
        it was reset in, which is then that of the stock evaluation.
        """
        self.robots[0].initialization_noise["magnitude"] = JOINT_NOISE if state is None else 0.0
        with _seed_generators(seed):
            self._place_objects()
        if state is not None:
            self.sim.set_state_from_flattened(state)
            self.sim.forward()
            self._check_success()
            self._post_process()
        self._arm = Arm(self.robots[0], self.sim.model._model, self.sim.data._data)
        # robosuite's observables sample once per control step, by a clock that every forced update
        # at reset sets one substep ahead.
        self.view_substep = SUBSTEPS if state is None else SUBSTEPS - 1

    def _place_objects(self) -> None:
        for _ in range(_PLACEMENT_ATTEMPTS):
            try:
                self.reset()
            except RandomizationError:
                continue
            return
        raise RuntimeError(
            f"{self.bddl_file_name}: no valid placement in {_PLACEMENT_ATTEMPTS} attempts"
        )

    def execute(
        self, action: Float64[np.ndarray, "7"], *, one_pass: bool, view: Callable[[], None] | None
    ) -> bool:
        """Execute one control step of 25 substeps; return the task's predicate.

        one_pass: make one forward pass per substep instead of the stock environment's several.
        view:     called when the stock sensors would sample.
        """
        substep = self._substep_once if one_pass else self._substep_stock
        self.timestep += 1
        for number in range(1, SUBSTEPS + 1):
            substep(action, number == 1)
            if view is not None and number == self.view_substep:
                view()
        self.cur_time += self.control_timestep
        self._post_process()
        return bool(self._check_success())

    def _substep_stock(self, action: Float64[np.ndarray, "7"], is_first: bool) -> None:
        """Leave the bits of the stock environment's three forward passes.

        The second and third have the state of the first, so that they repeat accelerations only:
        each starts the constraint solver from the result of the one before.
        """
        model = self.sim.model._model
        data = self.sim.data._data
        mujoco.mj_checkPos(model, data)
        mujoco.mj_checkVel(model, data)
        self.sim.forward()
        self._control(action, mujoco.mjtStage.mjSTAGE_VEL, is_first=is_first)
        mujoco.mj_step2(model, data)

    def _substep_once(self, action: Float64[np.ndarray, "7"], is_first: bool) -> None:
        model = self.sim.model._model
        data = self.sim.data._data
        mujoco.mj_step1(model, data)
        self._control(action, mujoco.mjtStage.mjSTAGE_ACC, is_first=is_first)
        mujoco.mj_step2(model, data)

    def _control(
        self, action: Float64[np.ndarray, "7"], current: mujoco.mjtStage, *, is_first: bool
    ) -> None:
        """Write this substep's torques and finger targets.

        current: the stage up to which the state has been propagated.
        """
        self.sim.current = current
        if is_first:
            # robosuite's own control sets the goal. After a fixed initial state it still uses the
            # kinematics from before that state.
            self._pre_action(action, True)
        else:
            self.sim.forward()
            self._arm.actuate(action)
        self.sim.current = mujoco.mjtStage.mjSTAGE_NONE


def build_problem(bddl: Path, compile_model: Callable[[str], mujoco.MjModel]) -> Any:
    """Build the problem of a BDDL file without resetting it; `compile_model` compiles MJCF."""
    name = get_problem_info(str(bddl))["problem_name"]
    stock = TASK_MAPPING[name]
    # LIBERO compares the name of the class with the one in the file.
    problem_class = type(stock.__name__, (Problem, stock), {})
    return problem_class(bddl, compile_model)


def _editable_arrays(model: mujoco.MjModel) -> Iterator[tuple[str, np.ndarray]]:
    for name in dir(model):
        if name.startswith("_") or name.startswith(_NEVER_CHANGED):
            continue
        value = getattr(model, name)
        if isinstance(value, np.ndarray):
            yield name, value


@contextmanager
def _seed_generators(seed: int) -> Iterator[None]:
    """Seed the global generators that robosuite and LIBERO draw from; restore them afterwards."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
