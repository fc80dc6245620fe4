"""Adapters in a second process, which has or has not imported the package."""

import subprocess
import sys

import torch
from peft import get_peft_model
from support import forks
from support.lora import TOKENS, config, llama, logits, randomize


def test_a_second_process_loads_an_adapter_after_the_import_or_stops_with_that_advice(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = randomize(get_peft_model(base, config()))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)

    advice = f"""import wanda_lightning.lora
from peft import PeftModel
model = PeftModel.from_pretrained(pruned, {str(tmp_path / "adapter")!r})
"""

    def run(load):
        code = f"""
import torch
from transformers import LlamaForCausalLM
pruned = LlamaForCausalLM.from_pretrained({str(tmp_path / "base")!r})
zeros = {{n: p == 0 for n, p in pruned.named_parameters()}}
{load}
tokens = torch.tensor({TOKENS.tolist()})
with torch.no_grad():
    torch.save(model.eval()(input_ids=tokens).logits, {str(tmp_path / "logits.pt")!r})
merged = model.merge_and_unload()
assert all(bool((p[zeros[n]] == 0).all()) for n, p in merged.named_parameters())
"""
        return forks.run(forks.execute, code)

    with_import = run(advice)
    assert with_import.returncode == 0, with_import.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
    import_line, *others = advice.splitlines(keepends=True)
    assert import_line.startswith("import wanda_lightning.lora")
    without = run("".join(others))
    assert without.returncode != 0
    *_, error = without.stderr.strip().splitlines()
    assert error.startswith("KeyError: ")
    assert "run 'import wanda_lightning.lora' before loading this adapter" in error


def test_without_peft_the_error_names_the_extra():
    code = "import sys; sys.modules['peft'] = None; import wanda_lightning.lora"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stderr.endswith("MissingPackageError: Adapters need peft: pip install '.[lora]' in the source folder\n")
