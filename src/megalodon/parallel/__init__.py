"""The same model over many devices: five axes, applied to the plain model from outside."""

from megalodon.parallel.mesh import AXES, Mesh, MeshSizes, mesh_problems
from megalodon.parallel.parallelize import ParallelModel
from megalodon.parallel.stage import Rows

__all__ = ["AXES", "Mesh", "MeshSizes", "ParallelModel", "Rows", "mesh_problems"]
