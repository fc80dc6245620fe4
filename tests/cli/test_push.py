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


def test_a_refused_upload_leaves_the_model_and_the_results(hub, text, capsys):
    hub.refused = "us/tiny"
    assert run(*text, "--save", "log", "--save_model", "out", *PUSH) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if "error: " in line]
    assert "push_to_hub='us/tiny' failed: the model is saved in out, but it was not uploaded" in message
    assert "To upload it later, run: hf upload us/tiny out --include README.md --include config.json" in message
    assert {"config.json", "model.safetensors"} <= everything_in(Path("out")).keys()
    assert "pruning_report.json" in everything_in(Path("log"))
    assert "Perplexity on" in out


def test_what_cannot_succeed_is_refused_before_pruning(hub, text, refused, monkeypatch):
    refused(*text, *PUSH, message="--push_to_hub must be left out for a command without --save_model")
    out = ["--save_model", "out"]
    refused(*text, *out, "--push_to_hub", "a/b/c", message="push_to_hub must be OWNER/NAME")
    monkeypatch.setenv("HF_TOKEN", "")
    refused(*text, *out, *PUSH, message="push_to_hub must be left out without a token")
    assert hub.requests == []
