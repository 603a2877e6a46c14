"""`python -m pipelines.demo.make` makes the bundled corpus and models again."""

from pipelines.demo.make.assets import main

main()
