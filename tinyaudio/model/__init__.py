"""Everything that travels inside a checkpoint, and nothing else: one flat, closed set of modules.

They import each other relatively and soft dependencies where they are used, so that transformers can load them from a
checkpoint folder in a process without tinyaudio.
"""
