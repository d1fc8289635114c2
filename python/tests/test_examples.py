"""The examples run and find what they promise."""

import importlib.util

import pytest
from conftest import ROOT


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "python" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_mistakes_of_the_port_are_found():
    verdict = example("judge_port").main()
    assert [c.name for c in verdict.causes] == ["image-scale", "suffix-positions"]
    assert verdict.unexplained is None and not verdict


def test_the_port_without_them_is_right():
    verdict = example("judge_port").main(())
    assert verdict and not verdict.causes


def test_openpis_loop():
    pytest.importorskip("openpi_client")
    assert example("openpi_loop").main(steps=12).shape == (12, 14)
