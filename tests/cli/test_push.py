"""`--push_to_hub`: what arrives at a hub on this machine is what was saved."""

from pathlib import Path

from support.cli import IGNORED_WARNINGS, everything_in, run
from support.hub import hub as hub, ignores_uploads

pytestmark = [*IGNORED_WARNINGS, ignores_uploads]
PUSH = ["--push_to_hub", "us/tiny"]


def test_a_pruned_model(hub, text, capsys, monkeypatch):
    monkeypatch.setattr("wanda_lightning.PruningReport.write", lambda report, path: Path(path).write_text("drawn"))
    more = ["--save", "out/logs", "--report", "out/page.html", "--private"]
    assert run(*text, "--stream", "--save_model", "out", *PUSH, *more) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Uploaded out to {hub.url}/us/tiny."
    saved = {name: content for name, content in everything_in(Path("out")).items() if content is not False}
    private = {name for name in saved if name.startswith(("logs", "page"))}
    assert len(private) == 3
    assert hub.repositories == {"us/tiny": {name: saved[name] for name in saved.keys() - private}}
    assert hub.private == {"us/tiny"}
    assert 'from_pretrained("us/tiny")' in hub.repositories["us/tiny"]["README.md"].decode()


def test_what_cannot_succeed_is_refused_before_pruning(hub, text, refused, monkeypatch):
    refused(*text, *PUSH, message="--push_to_hub must be left out for a command without --save_model")
    monkeypatch.setenv("HF_TOKEN", "")
    refused(*text, "--save_model", "out", *PUSH, message="push_to_hub must be left out without a token")
    assert hub.requests == []
