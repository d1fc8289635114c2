"""The Rust side."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

__version__: str

@final
class Inputs:
    """What one robot sees, ready for the network.

    `images`: for each camera `[3, H, W]` in -1..1, or None where it is absent; `tokens`: the prompt's, without padding;
    `state`: normalized, padded to the network's width; `noise`: `[horizon, action_dim]` to start from.
    """

    def __new__(
        cls,
        images: Sequence[Any],
        tokens: npt.ArrayLike,
        state: npt.ArrayLike | None = None,
        noise: npt.ArrayLike | None = None,
    ) -> "Inputs": ...
    @property
    def images(self) -> list[npt.NDArray[np.float32] | None]: ...
    @property
    def tokens(self) -> npt.NDArray[np.uint32]: ...
    @property
    def state(self) -> npt.NDArray[np.float32]: ...
    @property
    def noise(self) -> npt.NDArray[np.float32] | None: ...
    @noise.setter
    def noise(self, noise: npt.ArrayLike | None) -> None: ...
    def follow(
        self,
        previous: npt.ArrayLike,
        delay: int = 0,
        execution_horizon: int = 10,
        max_guidance_weight: float = 10.0,
        schedule: str = "linear",
    ) -> None:
        """Continues a chunk that is still being executed: lerobot's guided real-time chunking."""
    def continue_from(self, previous: npt.ArrayLike, delay: int) -> None:
        """Writes on behind actions that are known already: lerobot's trained real-time chunking, for π0.5."""

@final
class Model:
    """The network, on model tensors."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def device(self) -> str: ...
    def sample_actions(
        self, inputs: Inputs | Sequence[Inputs], *, seed: int = 0, steps: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Actions `[B, horizon, action_dim]` in the network's units."""

@final
class Policy:
    """Observation in, actions in the robot's units out: an openpi `BasePolicy`."""

    @property
    def model(self) -> Model: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: npt.ArrayLike | None = None,
        seed: int | None = None,
        steps: int | None = None,
    ) -> dict[str, Any]: ...
    def infer_batch(
        self, observations: Sequence[Mapping[str, Any]], *, seed: int | None = None, steps: int | None = None
    ) -> list[dict[str, Any]]: ...
    def preprocess(self, observation: Mapping[str, Any]) -> Inputs: ...
    def postprocess(self, actions: npt.ArrayLike, inputs: Inputs) -> npt.NDArray[np.float64]: ...
    def reset(self) -> None: ...
    def _summary(self) -> str: ...

def load(args: list[str], progress: Callable[[int, int], object] | None) -> Policy: ...
def judge(model: str, dump: str, format: str | None = None) -> tuple[str, str, str]: ...
def main(args: list[str]) -> int: ...
