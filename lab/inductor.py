"""A pass of our own for torch.compile on a CPU. Importing torch._inductor takes a second: only what
compiles imports this module."""

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass


class SignForMask(CustomGraphPass):
    """The gradient of a ReLU as a product with the sign of its output. Inductor keeps a mask of
    booleans for it, which it stores slowly on a CPU: without them CrossQ makes 18% more steps a
    second and SAC 27% (bf16, 5 seeds, 256 wide, one core). A gradient that is not finite where the
    ReLU is shut becomes NaN instead of 0, and so it shows."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        ops = torch.ops.aten
        # what depends on a gradient: a where of the forward pass stays
        backward: set[torch.fx.Node] = set()
        for node in graph.nodes:
            if node.name.startswith("tangents") or backward & set(node.all_input_nodes):
                backward.add(node)
        for node in graph.find_nodes(op="call_function", target=ops.where.self):
            mask, zero, gradient = node.args
            if gradient not in backward or mask.target != ops.le.Scalar or mask.args[1] != 0:
                continue
            output = mask.args[0]
            if output.target != ops.relu.default or zero.target != ops.full.default or zero.args[1]:
                continue
            if gradient.meta["val"].dtype != output.meta["val"].dtype:
                continue
            with graph.inserting_before(node):
                sign = graph.call_function(ops.sign.default, (output,))
                product = graph.call_function(ops.mul.Tensor, (gradient, sign))
            sign.meta["val"], product.meta["val"] = output.meta["val"], node.meta["val"]
            node.replace_all_uses_with(product)
        graph.eliminate_dead_code()

    def uuid(self) -> str:
        """Names this version of the pass in the cache of compiled code."""
        return "sign for mask, 2"
