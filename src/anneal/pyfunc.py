"""The logged predictor, as code: MLflow runs this script to load the model, and so needs no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class PyfuncPredictor(PythonModel):
    """An `anneal.serving` predictor over the logged files, which keep their places in the repository."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the predictor."""
        from anneal.serving import load_predictor

        self.predictor = load_predictor(Path(context.artifacts["root"]))

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: np.ndarray,  # MLflow warns of any closer hint
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> npt.NDArray[np.float64]:
        """Return class probabilities: images uint8 (N, H, W, C) to float64 (N, classes)."""
        return np.asarray(self.predictor.predict(np.asarray(model_input, np.uint8)))


set_model(PyfuncPredictor())
