"""Files that come with the package: models, predictors, the reference hull, tables; each with its card."""

from pathlib import Path

ASSETS = Path(__file__).parent
