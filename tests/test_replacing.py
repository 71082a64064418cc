"""What a written file may take the place of, and what it may not."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gptfit.config import make_run
from gptfit.door import read_config, save_run
from gptfit.errors import GptfitError
from gptfit.replacing import replacing

linux = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has it")


def write(path: Path, text: bytes) -> None:
    with replacing(path) as file:
        file.write(text)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "page.html", tmp_path / "page.html"
    link.symlink_to(target)
    for text in (b"first", b"second"):
        write(link, text)
        assert link.is_symlink() and target.read_bytes() == text
    run, link = make_run({"n_layer": 1}), tmp_path / "run.yaml"
    link.symlink_to(target)
    save_run(run, link)
    assert link.is_symlink() and read_config(str(link)).run == run
    assert os.listdir(tmp_path / "elsewhere") == ["page.html"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"text")
    reader.join(10)
    assert read == [b"text"] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone makes devices")
def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """Devices of its own: if this fails, the machine keeps its /dev/null."""
    for name, minor in (("null", 3), ("full", 7)):
        try:
            os.mknod(tmp_path / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
            (tmp_path / name).open("rb").close()
        except OSError:
            pytest.skip("no devices can be made here")
    write(tmp_path / "null", b"text")
    with pytest.raises(GptfitError, match="no space left"):
        write(tmp_path / "full", b"text")
    assert all(stat.S_ISCHR((tmp_path / name).stat().st_mode) for name in ("null", "full"))


@linux
def test_a_page_may_go_to_the_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-m", "gptfit", "estimate", "gpt2", "n_layer=1", "--html", "/dev/stdout"]
    with out.open("wb") as file:
        done: Any = subprocess.run(line, stdout=file, stderr=subprocess.PIPE, timeout=60)
    text = out.read_text()
    assert (done.returncode, done.stderr) == (0, b"")
    assert text.count("</html>") == 1 and "Needs " in text
    assert Path("/dev/stdout").is_symlink() or not Path("/dev/stdout").is_file()
