"""Did the approximation help: metrics, pictures and tables that compare methods; and decisions that can be relied on.

Metrics take the probabilities of any predictor, so that a Laplace approximation, a plain network and a network with a
fitted temperature are judged by the same code. Needs the extra ``evaluation`` (torchmetrics, matplotlib), which is
imported by the functions that use it and not by this package.
"""

from laplace.evaluation.conformal import ConformalPredictor, conformal
from laplace.evaluation.metrics import (
    ReliabilityBins,
    RiskCoverage,
    accuracy,
    brier_score,
    calibration_error,
    mean_nll,
    ood_auroc,
    reliability,
    risk_coverage,
    uncertainty,
)
from laplace.evaluation.plots import regression_band, reliability_diagram, risk_coverage_curve
from laplace.evaluation.report import Predictions, Report, predict, side_by_side
from laplace.evaluation.temperature import SoftmaxPredictor, best_temperature, fit_temperature

__all__ = [
    "ConformalPredictor",
    "Predictions",
    "ReliabilityBins",
    "Report",
    "RiskCoverage",
    "SoftmaxPredictor",
    "accuracy",
    "best_temperature",
    "brier_score",
    "calibration_error",
    "conformal",
    "fit_temperature",
    "mean_nll",
    "ood_auroc",
    "predict",
    "regression_band",
    "reliability",
    "reliability_diagram",
    "risk_coverage",
    "risk_coverage_curve",
    "side_by_side",
    "uncertainty",
]
