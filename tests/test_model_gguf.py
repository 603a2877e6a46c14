"""`decoder.gguf_file`: a decoder whose weights, configuration and tokenizer are in one GGUF file."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import write_recipe
from test_cli_families import tinyaudio
from torch import Tensor
from trainings import tiny_recipe
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipelines.errors import RecipeError
from pipelines.recipes import load_recipe
from pipelines.train.model import load_tokenizer
from tinyaudio.model import frozen
from tinyaudio.model.errors import MissingModelError, ModelError
from tinyaudio.model.frozen import load_decoder, weights_digest
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration

FILE = "tiny.gguf"
WIDTH, HEADS, LAYERS = 64, 4, 2
# llama.cpp's names, by transformers'.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of queries or keys as llama.cpp's rotary embedding takes them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, quantised: str = "F32") -> None:
    config, kind = model.config, gguf.GGMLQuantizationType[quantised]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokenizer))])  # 3: control
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(1)

    def add(name: str, weight: Tensor) -> None:
        values = weight.detach().numpy().astype(np.float32)
        if values.ndim == 2 and quantised != "F32":
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    for i, layer in enumerate(model.model.layers):
        for theirs, ours in NAMES.items():
            weight = layer.get_submodule(theirs).weight
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(ours)
            add(f"blk.{i}.{ours}.weight", weight if heads is None else interleaved(weight, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(folder / FILE, tiny_llama(tokenizer), tokenizer)
    return folder


def test_the_weights_and_the_tokenizer_are_those_of_the_file(
    gguf_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder, original = load_decoder(str(gguf_folder), None, torch.float32, FILE), tiny_llama(tokenizer)
    assert weights_digest(decoder) == weights_digest(original)
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    ids = torch.arange(20)[None]
    assert torch.equal(decoder(ids).logits, original(ids).logits)
    text = "the cat sat on the mat\nTranscript: a dog"
    loaded = load_tokenizer(str(gguf_folder), gguf_file=FILE)
    assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)


@pytest.mark.parametrize(("quantised", "error"), [("Q4_1", 0.1), ("Q8_0", 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_weights_are_expanded(
    quantised: str, error: float, dtype: torch.dtype, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    original = tiny_llama(tokenizer)
    write_gguf(tmp_path / FILE, original, tokenizer, quantised)
    decoder = load_decoder(str(tmp_path), None, dtype, FILE)
    assert {tensor.dtype for tensor in decoder.state_dict().values()} == {dtype}
    for (name, found), expected in zip(decoder.state_dict().items(), original.state_dict().values(), strict=True):
        assert (found.float() - expected).abs().max() <= error * expected.abs().max(), name
    embeds = torch.randn(1, 6, WIDTH, dtype=dtype, requires_grad=True)
    decoder(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None, "a projector learns through it"


def test_a_projector_is_trained_saved_and_loaded_with_a_gguf_decoder(
    gguf_folder: Path, encoder_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = tiny_recipe(tmp_path, encoder_folder, gguf_folder)
    recipe.write_text(recipe.read_text().replace("[decoder]", f'[decoder]\ngguf_file = "{FILE}"'))
    run, given = tmp_path / "run", ("--recipe", recipe, "--store", tmp_path / "store", "--device", "cpu")
    tinyaudio("extract", *given)
    assert tinyaudio("train", *given, "--run", run)["steps"] == 6
    model = TinyAudioForConditionalGeneration.from_pretrained(run)
    assert model.config.decoder_gguf_file == FILE
    assert weights_digest(model.decoder) == model.config.decoder_digest == weights_digest(tiny_llama(tokenizer))
    # A copy in the usual files has the same weights.
    tiny_llama(tokenizer).save_pretrained(tmp_path / "copy")
    copied = TinyAudioForConditionalGeneration.from_pretrained(run, decoder_id=str(tmp_path / "copy"))
    assert copied.config.decoder_gguf_file is None
    # Other weights are refused.
    write_gguf(gguf_folder / FILE, tiny_llama(tokenizer), tokenizer, "Q8_0")
    with pytest.raises(ModelError, match="expected the decoder weights"):
        TinyAudioForConditionalGeneration.from_pretrained(run)


def test_a_file_that_cannot_be_read_is_one_line(
    gguf_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(MissingModelError, match=r"expected the GGUF file .*other\.gguf.*found \['tiny\.gguf'\]"):
        load_decoder(str(gguf_folder), None, torch.float32, "other.gguf")
    whole = (gguf_folder / FILE).read_bytes()
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"\0" * 100, "is not a GGUF file"),
        *((whole[: len(whole) * i // 8], "damaged|cannot be loaded") for i in range(1, 8)),
        (whole[:200], "damaged"),
    ):
        (gguf_folder / FILE).write_bytes(content)
        with pytest.raises(ModelError, match=message):
            load_decoder(str(gguf_folder), None, torch.float32, FILE)
    monkeypatch.setattr(frozen.importlib.util, "find_spec", lambda _: None)
    (gguf_folder / FILE).write_bytes(whole)
    with pytest.raises(ModelError, match=r"pip install gguf"):
        load_decoder(str(gguf_folder), None, torch.float32, FILE)


def test_a_file_belongs_to_one_decoder(encoder_folder: Path, gguf_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.toml", tmp_path, encoder_folder, gguf_folder)
    recipe.write_text(recipe.read_text().replace("[decoder]", f'[decoder]\ngguf_file = "{FILE}"'))
    assert load_recipe(str(recipe)).decoder.gguf_file == FILE
    assert load_recipe(str(recipe), ["decoder.id=owner/name"]).decoder.gguf_file is None
    assert load_recipe(str(recipe), ["decoder.id=owner/name", "decoder.gguf_file=a.gguf"]).decoder.gguf_file == "a.gguf"
    with pytest.raises(RecipeError, match="gguf_file"):
        load_recipe(str(recipe), ["decoder.gguf=a.gguf"])
