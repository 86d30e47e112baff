"""robosuite's arm and gripper control for a substep without a new goal, minus the bookkeeping.

The equations, the numba functions and the resulting numbers are the same.

Imported only by `env.LiberoEnv`, in the process that owns the simulator.
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

    tau = J^T [Lambda_p (k_p e_p - k_d v), Lambda_r (k_p e_r - k_d w)] + bias
          + N^T M (10 (q_0 - q) - 2 sqrt(10) q')

    The only difference from `robosuite.robots.SingleArm.control` is that its lookups of names, its
    sensors and its three forward passes are left out.

    Source: O. Khatib, A unified approach for motion and force control of robot manipulators, 1987.
    """

    def __init__(self, robot: Any, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._robot = robot
        self._model = model
        self._data = data
        self._site = robot.eef_site_id
        self._qpos = list(robot._ref_joint_pos_indexes)
        self._qvel = list(robot._ref_joint_vel_indexes)
        self._motors = list(robot._ref_joint_actuator_indexes)
        self._fingers = list(robot._ref_joint_gripper_actuator_indexes)
        self._lowest, self._highest = robot.torque_limits
        limits = model.actuator_ctrlrange[self._fingers]
        closed, opened = limits.T
        self._middle = 0.5 * (opened + closed)
        self._half = 0.5 * (opened - closed)
        self._jacobian = np.zeros((2, 3, model.nv))
        self._inertia = np.zeros((model.nv, model.nv))

    def actuate(self, action: Float64[np.ndarray, "7"]) -> None:
        """Write this substep's torques and finger targets.

        Kinematics and velocities must be current.
        """
        data = self._data
        torques = self._torques()
        gripper = self._robot.gripper
        fingers = gripper.format_action(action[-1:])
        data.ctrl[self._motors] = np.clip(torques, self._lowest, self._highest)
        data.ctrl[self._fingers] = self._middle + self._half * fingers

    def _torques(self) -> Float64[np.ndarray, "7"]:
        data = self._data
        translation, rotation = self._jacobian
        mujoco.mj_jacSite(self._model, data, translation, rotation, self._site)
        mujoco.mj_fullM(self._model, self._inertia, data.qM)
        inertia = self._inertia[self._qvel, :][:, self._qvel]
        linear = translation[:, self._qvel]
        angular = rotation[:, self._qvel]
        jacobian = np.vstack([linear, angular])
        _, linear_mass, angular_mass, nullspace = opspace_matrices(
            inertia,
            jacobian,
            linear,
            angular,
        )
        wrench = self._wrench(linear_mass, angular_mass)
        torques = np.dot(jacobian.T, wrench) + data.qfrc_bias[self._qvel]
        posture = nullspace_torques(
            inertia,
            nullspace,
            self._robot.controller.initial_joint,
            data.qpos[self._qpos],
            data.qvel[self._qvel],
        )
        return torques + posture

    def _wrench(
        self, linear_mass: Float64[np.ndarray, "3 3"], angular_mass: Float64[np.ndarray, "3 3"]
    ) -> Float64[np.ndarray, "6"]:
        """Return the force and the torque that lead the end effector to the controller's goal."""
        data = self._data
        goal = self._robot.controller
        translation, rotation = self._jacobian
        position = data.site_xpos[self._site]
        orientation = data.site_xmat[self._site].reshape(3, 3)
        velocity = np.dot(translation, data.qvel)
        spin = np.dot(rotation, data.qvel)

        offset = goal.goal_pos - position
        turn = orientation_error(goal.goal_ori, orientation)
        force = offset * goal.kp[:3] + -velocity * goal.kd[:3]
        torque = turn * goal.kp[3:] + -spin * goal.kd[3:]
        return np.concatenate(
            [
                np.dot(linear_mass, force),
                np.dot(angular_mass, torque),
            ]
        )
