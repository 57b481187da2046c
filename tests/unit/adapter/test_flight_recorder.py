"""Where NCCL's last operations are written when one of them times out."""

from __future__ import annotations

from pathlib import Path

from megatron_smartmoe.adapter.records.flight_recorder import write_to


def test_the_dump_goes_to_the_run_directory(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    write_to(str(tmp_path), environ)
    assert environ == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/flight_recorder/rank",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    assert (tmp_path / "flight_recorder").is_dir()


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    """Under its present name or its former one."""
    own = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/elsewhere/rank"}
    environ = dict(own)
    write_to(str(tmp_path), environ)
    assert environ == own | {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def test_without_a_run_directory_torch_decides() -> None:
    environ: dict[str, str] = {}
    write_to(None, environ)
    assert environ == {}
