"""An adapter in a process that has not imported the package."""

from peft import get_peft_model
from support import forks
from support.lora import config, llama, randomize


def test_a_process_without_the_import_stops_with_that_advice(tmp_path):
    randomize(get_peft_model(llama(), config())).save_pretrained(tmp_path)
    code = f"""
from peft import PeftModel
PeftModel.from_pretrained(None, {str(tmp_path)!r})
"""
    done = forks.run(forks.execute, code)
    assert done.returncode != 0
    *_, error = done.stderr.strip().splitlines()
    assert error.startswith("KeyError: ")
    assert "run 'import wanda_lightning.lora' before loading this adapter" in error
