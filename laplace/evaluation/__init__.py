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
    ood_average_precision,
    ood_false_positives,
    reliability,
    risk_coverage,
    uncertainty,
)
from laplace.evaluation.plots import (
    regression_band,
    regression_calibration,
    reliability_diagram,
    risk_coverage_curve,
)
from laplace.evaluation.regression import (
    calibration_curve,
    compare_regressors,
    coverage,
    crps,
    gaussian_nll,
    rmse,
)
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
    "calibration_curve",
    "calibration_error",
    "compare_regressors",
    "conformal",
    "coverage",
    "crps",
    "fit_temperature",
    "gaussian_nll",
    "mean_nll",
    "ood_auroc",
    "ood_average_precision",
    "ood_false_positives",
    "predict",
    "regression_band",
    "regression_calibration",
    "reliability",
    "reliability_diagram",
    "risk_coverage",
    "risk_coverage_curve",
    "rmse",
    "side_by_side",
    "uncertainty",
]
