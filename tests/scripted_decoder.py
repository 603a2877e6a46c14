"""A decoder whose output is written by the test."""

import torch

from tinyaudio.model.recognize import Recognizer


class ScriptedDecoder:
    """Replaces the decoder: generates scripted texts by the length of the audio, and records its calls."""

    def __init__(self, model, tokenizer, script):
        self.config, self.generation_config, self.device = model.config, model.generation_config, model.device
        self.encoder, self.encode, self.token_ctc = model.encoder, model.encode, None
        self._tokenizer, self._script, self.asked = tokenizer, script, []

    def generate(self, features, num_frames, generation_config, stopping_criteria, **kwargs):
        self.asked.append((num_frames.tolist(), generation_config))
        rows = []
        for frames in num_frames.tolist():
            text, ends = self._script(frames, generation_config)
            rows.append(torch.tensor(self._tokenizer(text)["input_ids"] + ([0] if ends else [])))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)


def scripted(model, processor, script):
    fake = ScriptedDecoder(model, processor.tokenizer, script)
    return fake, Recognizer(fake, processor.feature_extractor, processor.tokenizer)


def is_retry(config):
    return config.repetition_penalty not in (None, 1.0)
