"""How curvature is computed (``backend=``, ``backend_kwargs=``): interfaces, the built-in back ends, and packages.

Back ends of other packages can be imported without them; these are imported when such a back end is made.
"""

from laplace.curvature.asdl import AsdlEF, AsdlGGN, AsdlHessian, AsdlInterface
from laplace.curvature.autograd import AutogradEF, AutogradGGN, AutogradHessian
from laplace.curvature.backpack import BackPackEF, BackPackGGN, BackPackInterface
from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN, CurvlinopsHessian, CurvlinopsInterface

BACKENDS: tuple[type[CurvatureInterface], ...] = (
    AutogradGGN,
    AutogradEF,
    AutogradHessian,
    BackPackGGN,
    BackPackEF,
    AsdlGGN,
    AsdlEF,
    AsdlHessian,
    CurvlinopsGGN,
    CurvlinopsEF,
    CurvlinopsHessian,
)
"""All back ends of the library; messages and documentation read off them what each can do."""

__all__ = [
    "BACKENDS",
    "AsdlEF",
    "AsdlGGN",
    "AsdlHessian",
    "AsdlInterface",
    "AutogradEF",
    "AutogradGGN",
    "AutogradHessian",
    "BackPackEF",
    "BackPackGGN",
    "BackPackInterface",
    "CurvatureInterface",
    "CurvlinopsEF",
    "CurvlinopsGGN",
    "CurvlinopsHessian",
    "CurvlinopsInterface",
    "EFInterface",
    "GGNInterface",
]
