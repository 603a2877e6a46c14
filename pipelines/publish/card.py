"""The model card: made from what the run and its evaluations left on the disk, and from nothing else.

No number is written here by hand. What the run did not measure is said to be unknown; an evaluation with failures is
marked and kept out of the machine-readable results, and so is one of a part of a set or of stored features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipelines.corpora.sources import is_loquacious
from pipelines.evaluate.eval_sets import corpus_name
from pipelines.evaluate.report.blocks import Block, Bullets, Code, Heading, Paragraph, Table, to_markdown
from pipelines.evaluate.report.report import METHOD, headline, mark, percent, set_name, span
from pipelines.evaluate.summary import Score, Summary
from pipelines.publish.facts import Energy, ModelFacts, TrainingFacts, public_name
from pipelines.recipes import Recipe
from tinyaudio.model.frozen import is_hub_id

_MAX_NEW_TOKENS = 200  # of a model of ours; another number is said
PIPELINE_TAG = "automatic-speech-recognition"
_CITATION = """```bibtex
@misc{tinyaudio,
  title = {tinyaudio: a frozen speech encoder, a frozen language model, and one small trained projector},
  note = {after alexkroman/tiny-audio and SLAM-ASR}
}
@article{hsu2021hubert, title = {HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of
  Hidden Units}, author = {Hsu, Wei-Ning and others}, journal = {IEEE/ACM TASLP}, year = {2021},
  note = {arXiv 2106.07447}}
@article{ma2024slamasr, title = {An Embarrassingly Simple Approach for LLM with Strong ASR Capacity},
  author = {Ma, Ziyang and others}, year = {2024}, note = {arXiv 2402.08846}}
```"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything a card may say."""

    repo_id: str
    model: ModelFacts
    training: TrainingFacts
    recipe: Recipe | None
    evaluations: Sequence[Summary]
    controls: Sequence[Summary]  # other systems on the same sets, such as the encoder's own head
    samples: Sequence[tuple[str, str, str]]  # set, reference, hypothesis
    energy: Energy | None


def make_card(facts: CardFacts) -> ModelCard:
    """Write the card; its front matter carries the complete evaluations as `model-index`."""
    body = to_markdown(_blocks(facts)) + "\n## Citation\n\n" + _CITATION + "\n"
    return ModelCard(f"---\n{_front_matter(facts).to_yaml()}\n---\n\n{body}")


def _front_matter(facts: CardFacts) -> ModelCardData:
    parts = [facts.model.encoder_id, facts.model.decoder_id]
    corpus = facts.recipe.corpus.name if facts.recipe is not None else None
    results = [result for summary in facts.evaluations for result in _eval_results(summary)]
    emissions = facts.energy.to_front_matter() if facts.energy is not None else None
    return ModelCardData(
        language="en",
        license="mit",
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=[part for part in parts if is_hub_id(part)] or None,
        datasets=[corpus] if corpus else None,
        metrics=["wer", "cer"],
        tags=["tinyaudio", "speech-recognition", "frozen-encoder", "projector"],
        model_name=facts.repo_id.split("/")[-1],
        eval_results=results or None,
        **({"co2_eq_emissions": emissions} if emissions else {}),
    )


def is_complete(summary: Summary) -> bool:
    """Tell whether an evaluation measured a whole set from its audio: no failure, no part of it, a defined rate."""
    has_failures = summary.headline.word_errors.failed > 0
    return not has_failures and _part_of_set(summary) is None and summary.headline.wer is not None


def _part_of_set(summary: Summary) -> str | None:
    """Say what keeps an evaluation from being one of the whole set's audio, in a few words."""
    scored = summary.settings.scored
    if scored.get("store_fingerprint") is not None:
        return "stored features"
    if scored.get("max_samples") is not None:
        return f"sample of {scored['max_samples']:,}"
    return "one source" if scored.get("source") is not None else None


def _eval_results(summary: Summary) -> list[EvalResult]:
    if not is_complete(summary):
        return []
    scored, corpus = summary.settings.scored, summary.settings.corpus_name
    provenance = scored.get("provenance") or {}
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name="Automatic Speech Recognition",
            dataset_type=corpus if is_hub_id(corpus) else f"local/{corpus}",
            dataset_name=set_name(summary),
            dataset_config=scored.get("config"),
            dataset_split=str(scored.get("split")),
            dataset_revision=provenance.get("revision"),
            metric_type=kind,
            metric_value=round(100 * rate, 2),
            metric_name=f"{kind.upper()}, {score.label} text ({score.detail}), {_decoding(summary)}",
        )
        for score in summary.scores
        for kind, rate in (("wer", score.wer), ("cer", score.cer))
        if rate is not None
    ]


def one_of_each(evaluations: Mapping[str, Summary]) -> dict[str, Summary]:
    """Keep one evaluation of each set by each system with each decoding: the largest, of those the last.

    Args:
        evaluations: by name, oldest first.
    """
    kept: dict[tuple[Any, ...], str] = {}
    for name, one in evaluations.items():
        system = "ours" if one.settings.provider == "tinyaudio" else one.name  # a renamed run is the same model
        key = (set_key(one), system, _decoding(one))
        if key not in kept or _size(one) >= _size(evaluations[kept[key]]):
            kept[key] = name
    return {name: one for name, one in evaluations.items() if name in kept.values()}


def set_key(summary: Summary) -> tuple[Any, ...]:
    """Tell sets apart: by what their files hold where that is known, since a folder may be named anew."""
    scored = summary.settings.scored
    origin = (scored.get("provenance") or {}).get("files_digest") or summary.settings.corpus_name
    return (origin, *(scored.get(name) for name in ("config", "split", "source")))


def _size(summary: Summary) -> int:
    return summary.headline.word_errors.utterances


def _decoding(summary: Summary) -> str:
    """Say how answers were searched for, with all that tells two evaluations of one model apart."""
    decoding = summary.settings.model.get("decoding", "the service's own decoding")
    if not isinstance(decoding, dict):
        return str(decoding)
    beams = decoding.get("num_beams", "its own")
    parts = ["greedy" if beams == 1 else f"{beams} beams"]
    if decoding.get("max_new_tokens") not in (None, _MAX_NEW_TOKENS):
        parts.append(f"at most {decoding['max_new_tokens']} tokens")
    if decoding.get("length_penalty") not in (None, 1.0):
        parts.append(f"length penalty {decoding['length_penalty']:g}")
    if summary.settings.scored.get("store_fingerprint") is not None:
        parts.append("stored features")
    elif decoding.get("guard") is False:
        parts.append("unguarded")
    return ", ".join(parts)


def _blocks(facts: CardFacts) -> list[Block]:
    return [
        Heading(1, facts.repo_id),
        *_what_it_is(facts.model),
        *_how_to_use(facts),
        *_architecture(facts.model),
        *_training(facts),
        *_results(facts),
        *_samples(facts),
        *_uses(facts),
        *_impact(facts),
    ]


def _what_it_is(model: ModelFacts) -> list[Block]:
    encoder, decoder = public_name(model.encoder_id), public_name(model.decoder_id)
    blocks: list[Block] = [
        Paragraph(
            f"Speech recognition in English: a frozen encoder ({encoder}), a trained projector of "
            f"{model.num_parameters:,} parameters, and a frozen language model ({decoder}). Only the projector was "
            "trained, and only the projector is in this repository; the frozen parts are loaded from where they live."
        )
    ]
    if not (is_hub_id(model.encoder_id) and is_hub_id(model.decoder_id)):
        blocks.append(
            Paragraph(
                "The frozen parts of this model are local stand-ins, not published models, so nobody else can load it. "
                "Its numbers say that the line from audio to text works; they say nothing about models of real size.",
                kind="warning",
            )
        )
    return blocks


def _how_to_use(facts: CardFacts) -> list[Block]:
    return [
        Heading(2, "How to use it"),
        Code("bash", [f"tinyaudio transcribe --model {facts.repo_id} speech.wav"]),
        Code(
            "python",
            [
                "from transformers import pipeline",
                f'recognizer = pipeline("{PIPELINE_TAG}", model="{facts.repo_id}", trust_remote_code=True)',
                'print(recognizer("speech.wav")["text"])',
            ],
        ),
        Paragraph("Pin a revision where you run code from a repository. SHA256SUMS lists the digest of every file."),
    ]


def _architecture(model: ModelFacts) -> list[Block]:
    rows = [
        ["Encoder, frozen", model.encoder_id, model.encoder_revision or "", f"{model.encoder_dim} wide, 50 Hz"],
        ["Projector, trained", model.projector_kind, "", f"{model.num_parameters:,} parameters, float32"],
        ["Decoder, frozen", model.decoder_id, model.decoder_revision or "", f"{model.decoder_dim} wide"],
    ]
    return [
        Heading(2, "Architecture"),
        Table(("Part", "What", "Revision", "Size"), [[row[0], public_name(row[1]), *row[2:]] for row in rows]),
        Paragraph(
            f"The projector joins {model.stack_factor} neighbouring frames (a short last stack is zero-padded), so the "
            f"decoder sees {50 / model.stack_factor:g} frames a second, between two fixed pieces of text."
        ),
    ]


def _training(facts: CardFacts) -> list[Block]:
    training, recipe = facts.training, facts.recipe
    lines = []
    if recipe is not None:
        corpus, settings = recipe.corpus, recipe.train
        lines += [
            f"data: {' '.join(filter(None, (corpus_name(corpus), corpus.config)))}, split {corpus.train_split}",
            f"optimizer: AdamW, learning rate {settings.learning_rate:g}, {settings.warmup_steps} warm-up steps, "
            f"cosine, weight decay {settings.weight_decay:g}, gradient norm clipped at {settings.max_grad_norm:g}",
            f"batches: {settings.batch_tokens} decoder positions, {settings.accumulate} in a step",
            f"precision: projector float32{', bfloat16 autocast on a GPU' if settings.bf16 else ''}",
            f"seed: {settings.seed}",
        ]
        if settings.jitter_frames:
            lines.append(f"augmentation: up to {settings.jitter_frames} first frames dropped, anew each epoch")
    known = {
        "steps": f"{training.steps:,}" if training.steps is not None else None,
        "last training loss": f"{training.loss:.4f} nats a token" if training.loss is not None else None,
        "audio seen": f"{training.audio_s / 3600:.2f} h, repetitions counted" if training.audio_s else None,
        "time of stage two": f"{training.seconds:,.0f} s" if training.seconds is not None else None,
        "feature store": model_store(facts.model),
    }
    lines += [f"{name}: {value}" for name, value in known.items() if value]
    return [Heading(2, "Training"), Bullets(lines or ["not recorded"])]


def model_store(model: ModelFacts) -> str | None:
    return f"fingerprint {model.store_fingerprint[:12]}" if model.store_fingerprint else None


def _results(facts: CardFacts) -> list[Block]:
    if not facts.evaluations:
        return [Heading(2, "Results"), Paragraph("This model was not evaluated.", kind="warning")]
    columns = ("Set", "System", "Text", "WER", "95 % interval", "CER", "Utterances")
    rows = [row for summary in facts.evaluations for row in _result_rows(summary)]
    rows += [row for summary in facts.controls for row in _result_rows(summary)]
    blocks: list[Block] = [Heading(2, "Results"), Table(columns, rows)]
    if any(summary.headline.word_errors.failed for summary in (*facts.evaluations, *facts.controls)):
        blocks.append(
            Paragraph(
                "* Some utterances have no answer; the rate is that of the others, not of the whole set.", "warning"
            )
        )
    blocks += [Paragraph(f"{_what_was_scored(one)}: {headline(one)}") for one in facts.evaluations]
    if any(summary.settings.provider == "ctc" for summary in facts.controls):
        blocks.append(
            Paragraph("ctc is the encoder's own head without projector and language model: what it lacks, they add.")
        )
    notes = dict.fromkeys(note for one in facts.evaluations for note in one.notes)
    blocks += [Paragraph(note, kind="warning") for note in notes]
    blocks.append(
        Paragraph(
            f"{METHOD} The model is run as for transcribing, with voice detection and guard, unless it says otherwise. "
            "Reports with breakdowns and the worst utterances: evaluations/."
        )
    )
    return blocks


def _what_was_scored(summary: Summary) -> str:
    part = _part_of_set(summary)
    return f"{set_name(summary)}{f' ({part})' if part else ''}, {_decoding(summary)}"


def _result_rows(summary: Summary) -> list[list[str]]:
    return [_result_row(summary, score) for score in summary.scores]


def _result_row(summary: Summary, score: Score) -> list[str]:
    counts = score.word_errors
    part = _part_of_set(summary)
    return [
        set_name(summary),
        f"{summary.settings.provider}, {_decoding(summary)}",
        score.label,
        mark(percent(score.wer), counts.failed),
        span(score.interval),
        mark(percent(score.cer), counts.failed),
        f"{counts.utterances:,}" + (f" ({part})" if part else ""),
    ]


def _samples(facts: CardFacts) -> list[Block]:
    if not facts.samples:
        return []
    return [
        Heading(2, "Samples"),
        Paragraph("Chosen by a fixed seed, not by hand."),
        Table(("Set", "Reference", "Output"), [list(sample) for sample in facts.samples]),
    ]


def _uses(facts: CardFacts) -> list[Block]:
    corpus = facts.recipe.corpus if facts.recipe is not None else None
    limits = [
        "English only, and speech like that of its training data; other accents, rooms and topics were not measured",
        "a language model writes the text: it can leave words out, repeat itself, or invent words that nobody said",
        "no speaker labels, no translation, no times for single words",
    ]
    if corpus is not None and corpus.text_case == "lower":
        limits.append(
            "output is in lower case" + (" without punctuation" if corpus.text_punctuation == "remove" else "")
        )
    if corpus is not None and is_loquacious(corpus.name or corpus.path):
        limits.append("parts of the training transcripts were made by machines, with their errors")
    return [
        Heading(2, "Intended use"),
        Bullets(["research on projectors between frozen models", "transcription that a person checks"]),
        Heading(2, "Out of scope"),
        Bullets(
            [
                "decisions about people, and records in law, medicine or policing, that nobody checks by ear",
                "surveillance, or identifying speakers",
                "live captions that somebody's safety depends on",
            ]
        ),
        Heading(2, "Limitations"),
        Bullets(limits),
    ]


def _impact(facts: CardFacts) -> list[Block]:
    if facts.training.seconds is None:
        text = "The time of training was not recorded, so no energy is stated."
    elif facts.energy is None:
        text = (
            f"Stage two took {facts.training.seconds:,.0f} s. No power was stated for the machine, so no energy is "
            "computed. Extraction and the frozen parts' own training are not counted."
        )
    else:
        text = facts.energy.describe() + " Extraction and the frozen parts' own training are not counted."
    return [Heading(2, "Environmental impact"), Paragraph(text)]
