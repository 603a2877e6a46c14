"""A small copy of a trained model for others: the projector in float16, without code and without paths of this machine.

The copy is opened by tinyaudio alone (`tinyaudio transcribe --model FOLDER`), since no code travels with it. Half
precision is what is evaluated, so the numbers are those of the copy.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipelines.files import write_text
from pipelines.recipes import load_recipe

COPIED = "generation_config.json processor_config.json preprocessor_config.json tokenizer.json tokenizer_config.json"
COPIED += " special_tokens_map.json chat_template.jinja"
WITH_CODE = ("auto_map", "custom_pipelines")  # of config.json: they name modules that are not in the copy


def export(run: Path, out: Path, *, encoder_id: str, decoder_id: str) -> Path:
    """Copy the model of a run.

    Args:
        run: a run or a checkpoint of one, with recipe.toml beside it or two folders above.
        out: folder to make; it is either complete or absent.
        encoder_id, decoder_id: where the copy looks for the frozen parts; a relative path is relative to the working
            directory of the command that loads it.
    """
    recipe = next(path for path in (run / "recipe.toml", run.parent.parent / "recipe.toml") if path.is_file())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        made = Path(temporary, "made")
        made.mkdir()
        weights = load_file(run / "model.safetensors")
        half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        save_file(half, made / "model.safetensors", metadata={"format": "pt"})
        for name in COPIED.split():
            if (run / name).is_file():
                shutil.copyfile(run / name, made / name)
        config = json.loads((run / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in WITH_CODE and key != "_name_or_path"}
        config |= {"encoder_id": encoder_id, "decoder_id": decoder_id, "dtype": str(torch.float16)[6:]}
        write_text(made / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        settings = load_recipe(str(recipe), [f"encoder.id={encoder_id}", f"decoder.id={decoder_id}"])
        if settings.corpus.path is not None:
            corpus = settings.corpus.model_copy(update={"path": Path(settings.corpus.path).name})
            settings = settings.model_copy(update={"corpus": corpus})
        settings.save(made / "recipe.toml")
        shutil.move(made, out)
    return out
