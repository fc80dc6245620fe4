"""Output that cannot be shown does not end a command."""

import io
import os
import shlex
import subprocess
import sys

import pytest

from wanda_lightning.cli.streams import TolerantStream, tolerant_streams


def test_what_cannot_be_encoded_is_replaced():
    raw = io.BytesIO()
    stream = TolerantStream(io.TextIOWrapper(raw, encoding="ascii"))
    assert stream.write("50 % • │ done") == len("50 % • │ done")
    stream.flush()
    assert raw.getvalue() == b"50 % ? ? done"
    assert not stream.is_broken


def test_a_closed_pipe_is_written_to_no_more():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as file:
        stream = TolerantStream(file)
        stream.write("lost")
        stream.flush()
        assert stream.is_broken
        stream.write("lost, too")
        stream.flush()


def test_the_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with tolerant_streams() as streams:
        assert [sys.stdout, sys.stderr] == streams
        assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before


def test_an_ascii_terminal_shows_a_table():
    code = "from rich.table import Table; from wanda_lightning.cli.streams import tolerant_streams\n"
    code += "from wanda_lightning.cli.output import print_table\n"
    code += "table = Table('naïve •'); table.add_row('é')\nwith tolerant_streams(): print_table(table)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert b"na?ve ?" in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_was_closed_before_the_start(tmp_path, closed):
    """As under some supervisors: the work goes on, and no file gets the output."""
    code = "import os, sys; from wanda_lightning.cli.streams import tolerant_streams\n"
    code += "with tolerant_streams(), open(sys.argv[1], 'w') as file:\n"
    code += "    print('out'); print('err', file=sys.stderr); os.write(1, b'of a library'); file.write('saved')"
    command = shlex.join([sys.executable, "-c", code, str(tmp_path / "result")])
    subprocess.run(["bash", "-c", f"{command} {closed}"], check=True, capture_output=True)
    assert (tmp_path / "result").read_text() == "saved"
