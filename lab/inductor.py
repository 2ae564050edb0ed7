"""A custom graph pass for torch.compile on a CPU. Import this module only to compile: importing
torch._inductor takes a second."""

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass


class SignForMask(CustomGraphPass):
    """Compute the gradient of a ReLU as gradient * sign(output). Inductor saves a boolean mask for
    it, and storing that is slow on a CPU: without the mask, CrossQ makes 18% more steps/s and SAC
    27% (bf16, 5 seeds, 256 wide, one core). A non-finite gradient at an inactive unit becomes NaN
    instead of 0, so it does not stay hidden."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        ops = torch.ops.aten
        # nodes that depend on a gradient; a `where` of the forward pass must stay
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
        """Key of this version of the pass in the compile cache."""
        return "sign for mask, 2"
