"""`python -m pipelines.demo.make` makes the bundled stand-ins again."""

from pipelines.demo.make.assets import main

main()
