"""Function space (``hessian_structure="gp"``, ``functional_approximation=``): kernels of the linearized network."""
