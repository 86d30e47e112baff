"""robosuite's arm and gripper control for a substep without a new goal, less the bookkeeping: same equations, same numba functions, same numbers.

Imported by `libero.make` only, in the process that owns the simulator.
"""

# robosuite keeps the indices of its joints private.
# ruff: noqa: SLF001
# pyright: basic, reportAttributeAccessIssue=false

from typing import Any

import mujoco
import numpy as np
from jaxtyping import Float64
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error


class Arm:
    """Operational-space control of a robosuite robot whose model and data it shares.

    tau = J^T [Lambda_p (k_p e_p - k_d v), Lambda_r (k_p e_r - k_d w)] + bias + N^T M (10 (q_0 - q) - 2 sqrt(10) q')

    O. Khatib, A unified approach for motion and force control of robot manipulators, 1987. Reading names, sensors and three forward passes
    out of robosuite's loop is all that differs from `robosuite.robots.SingleArm.control`.
    """

    def __init__(self, robot: Any, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._robot, self._model, self._data = robot, model, data
        self._site = robot.eef_site_id
        self._qpos = list(robot._ref_joint_pos_indexes)
        self._qvel = list(robot._ref_joint_vel_indexes)
        self._motors = list(robot._ref_joint_actuator_indexes)
        self._fingers = list(robot._ref_joint_gripper_actuator_indexes)
        self._lowest, self._highest = robot.torque_limits
        closed, opened = model.actuator_ctrlrange[self._fingers].T
        self._middle, self._half = 0.5 * (opened + closed), 0.5 * (opened - closed)
        self._jacobian = np.zeros((2, 3, model.nv))
        self._inertia = np.zeros((model.nv, model.nv))

    def actuate(self, action: Float64[np.ndarray, "7"]) -> None:
        """Write this substep's torques and finger targets. Kinematics and velocities must be current."""
        self._data.ctrl[self._motors] = np.clip(self._torques(), self._lowest, self._highest)
        self._data.ctrl[self._fingers] = (
            self._middle + self._half * self._robot.gripper.format_action(action[-1:])
        )

    def _torques(self) -> Float64[np.ndarray, "7"]:
        data, goal = self._data, self._robot.controller
        mujoco.mj_jacSite(self._model, data, self._jacobian[0], self._jacobian[1], self._site)
        mujoco.mj_fullM(self._model, self._inertia, data.qM)
        inertia = self._inertia[self._qvel, :][:, self._qvel]
        linear, angular = self._jacobian[0][:, self._qvel], self._jacobian[1][:, self._qvel]
        both = np.vstack([linear, angular])
        _, mass_linear, mass_angular, nullspace = opspace_matrices(inertia, both, linear, angular)

        error = goal.goal_pos - data.site_xpos[self._site]
        turn = orientation_error(goal.goal_ori, data.site_xmat[self._site].reshape(3, 3))
        force = error * goal.kp[:3] + -np.dot(self._jacobian[0], data.qvel) * goal.kd[:3]
        torque = turn * goal.kp[3:] + -np.dot(self._jacobian[1], data.qvel) * goal.kd[3:]
        wrench = np.concatenate([np.dot(mass_linear, force), np.dot(mass_angular, torque)])
        torques = np.dot(both.T, wrench) + data.qfrc_bias[self._qvel]
        return torques + nullspace_torques(
            inertia, nullspace, goal.initial_joint, data.qpos[self._qpos], data.qvel[self._qvel]
        )
