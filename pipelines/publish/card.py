"""The model card: what the run and its evaluations recorded, and nothing else.

No number is written by hand. What the run did not measure is given as unknown. An evaluation with failures, or of a
part of a set, is marked and left out of the machine-readable results.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipelines.corpora.sources import is_loquacious
from pipelines.evaluate.eval_sets import corpus_name
from pipelines.evaluate.report.report import METHOD, headline, render, set_name
from pipelines.evaluate.summary import Summary
from pipelines.recipes import Recipe
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.frozen import is_hub_id
from tinyaudio.model.modeling_tinyaudio import GENERATION_DEFAULTS

PIPELINE_TAG = "automatic-speech-recognition"


def make_card(
    repo_id: str,
    *,
    config: TinyAudioConfig,
    num_parameters: int,
    recipe: Recipe | None,
    report: dict[str, Any],
    evaluations: Sequence[Summary],
    controls: Sequence[Summary],
    samples: Sequence[dict[str, str]],
    power_watts: float | None,
    grams_per_kwh: float | None,
) -> ModelCard:
    """Write the card; its front matter carries the complete evaluations as `model-index`.

    Args:
        config: of the model, with the public names of the frozen parts.
        num_parameters: of the projector.
        report: the closing report of training, from run.json; empty if there is none.
        evaluations: of this model.
        controls: of other systems on the same sets, such as the encoder's own CTC head.
        samples: "set", "reference" and "output" of each.
        power_watts: of the machine during training; None gives no energy.
        grams_per_kwh: of CO2, for the emissions; None gives none.
    """
    has_energy = power_watts is not None and report.get("seconds") is not None
    kwh = power_watts * report["seconds"] / 3.6e6 if power_watts is not None and has_energy else None
    emissions = None
    if kwh is not None and grams_per_kwh is not None:
        source = f"measured time, stated power of {power_watts:g} W, stated grid"
        emissions = {"emissions": kwh * grams_per_kwh, "source": source, "training_type": "projector only"}
    data = ModelCardData(
        language="en",
        license="mit",
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=[part for part in (config.encoder_id, config.decoder_id) if is_hub_id(part)] or None,
        datasets=[recipe.corpus.name] if recipe is not None and recipe.corpus.name else None,
        metrics=["wer", "cer"],
        tags=["tinyaudio", "speech-recognition", "frozen-encoder", "projector"],
        model_name=repo_id.split("/")[-1],
        eval_results=[result for one in evaluations for result in _eval_results(one)] or None,
        **({"co2_eq_emissions": emissions} if emissions else {}),
    )
    body = render(
        Path(__file__).with_name("card.md.j2"),
        repo_id=repo_id,
        config=config,
        num_parameters=num_parameters,
        recipe=recipe,
        corpus_name=corpus_name(recipe.corpus) if recipe is not None else None,
        report=report,
        evaluations=list(evaluations),
        controls=list(controls),
        samples=samples,
        kwh=kwh,
        power_watts=power_watts,
        grams_per_kwh=grams_per_kwh,
        method=METHOD,
        decoding=decoding,
        headline=headline,
        is_hub_id=is_hub_id,
        is_loquacious=is_loquacious,
        part_of_set=part_of_set,
        set_name=set_name,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _eval_results(summary: Summary) -> list[EvalResult]:
    """Return the rates of an evaluation of a whole set without failures; nothing for another one."""
    if summary.headline.word_errors.failed or part_of_set(summary) is not None or summary.headline.wer is None:
        return []
    scored, corpus = summary.settings.scored, summary.settings.corpus_name
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name="Automatic Speech Recognition",
            dataset_type=corpus if is_hub_id(corpus) else f"local/{corpus}",
            dataset_name=set_name(summary),
            dataset_config=scored.get("config"),
            dataset_split=str(scored.get("split")),
            dataset_revision=(scored.get("provenance") or {}).get("revision"),
            metric_type=kind,
            metric_value=round(100 * rate, 2),
            metric_name=f"{kind.upper()}, {score.normalizer} text ({score.detail}), {decoding(summary)}",
        )
        for score in summary.scores
        for kind, rate in (("wer", score.wer), ("cer", score.cer))
        if rate is not None
    ]


def part_of_set(summary: Summary) -> str | None:
    """Return which part of a set was evaluated, in a few words; None for the whole set."""
    scored = summary.settings.scored
    if scored.get("max_samples") is not None:
        return f"sample of {scored['max_samples']:,}"
    return "one source" if scored.get("source") is not None else None


def decoding(summary: Summary) -> str:
    """Return how answers were decoded, with every setting that tells two evaluations of one model apart."""
    found = summary.settings.model.get("decoding", "the service's own decoding")
    if not isinstance(found, dict):
        return str(found)
    beams = found.get("num_beams", "default")
    parts = ["greedy" if beams == 1 else f"{beams} beams"]
    if found.get("max_new_tokens") not in (None, GENERATION_DEFAULTS["max_new_tokens"]):
        parts.append(f"at most {found['max_new_tokens']} tokens")
    if found.get("length_penalty") not in (None, GENERATION_DEFAULTS["length_penalty"]):
        parts.append(f"length penalty {found['length_penalty']:g}")
    if found.get("guard") is False:
        parts.append("unguarded")
    return ", ".join(parts)
