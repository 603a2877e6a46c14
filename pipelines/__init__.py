"""The stages, in order: corpora -> extract (stage one) -> batches -> train (stage two) -> evaluate.

Each stage reads a recipe and leaves files behind that the next one reads; stages do not import stages. What two of them
share stands in a module with a name: recipes, corpora, batches, scoring, runs.
"""
