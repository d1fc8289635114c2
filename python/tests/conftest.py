import pathlib

import numpy as np
import pytest

import pi0

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny():
    return ROOT / "models" / "tiny"


@pytest.fixture(scope="session")
def golden():
    return ROOT / "golden" / "b"


@pytest.fixture(scope="session")
def policy(tiny):
    return pi0.load(tiny, threads=2, seed=1)


@pytest.fixture
def observation():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 48, 64), dtype=np.uint8)
    return {
        "observation.images.base_0_rgb": image,
        "observation.state": rng.normal(size=14),
        "prompt": "Transfer cube",
    }
