"""A robot for lerobot's programs: it is wherever it was told to be, and remembers what it was told."""

from dataclasses import dataclass

import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = [f"joint_{i}.pos" for i in range(14)]
TOLD: "list[dict[str, float]]" = []


@RobotConfig.register_subclass("still_robot")
@dataclass(kw_only=True)
class StillRobotConfig(RobotConfig):
    pass


class StillRobot(Robot):
    config_class = StillRobotConfig
    name = "still_robot"

    def __init__(self, config):
        super().__init__(config)
        self.at = dict.fromkeys(JOINTS, 0.0)
        self.connected = False

    @property
    def observation_features(self):
        return {**dict.fromkeys(JOINTS, float), "top": (48, 64, 3)}

    @property
    def action_features(self):
        return dict.fromkeys(JOINTS, float)

    @property
    def is_connected(self):
        return self.connected

    @property
    def is_calibrated(self):
        return True

    def connect(self, calibrate=True):
        self.connected = True

    def disconnect(self):
        self.connected = False

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_observation(self):
        return {**self.at, "top": np.full((48, 64, 3), 90, np.uint8)}

    def send_action(self, action):
        TOLD.append(dict(action))
        self.at.update({name: float(value) for name, value in action.items()})
        return action
