"""Add dependencies to an ONNX training step, so that runtimes need little memory in any valid order of its nodes.

Between frozen layers, the backward pass of an activation such as ReLU needs only a mask, with one byte for each
element. A runtime may run the nodes in any order in which the inputs of each node are computed before the node. Two
orders waste memory:

- The mask is computed in the backward pass. Until then, the activation itself stays in memory, with four bytes for
  each element. ONNX Runtime's default order does this.
- The forward pass already computes a factor, which is a tensor by which the backward pass multiplies a gradient. For
  example, it converts the mask to floating point, with four bytes for each element. ONNX Runtime does this with
  `ExecutionOrder.PRIORITY_BASED`, if its optimizations have replaced nodes.

The added nodes make both orders invalid. They compute the number 1 (or True) from the size of a tensor, and multiply a
number by this 1 (or combine a mask with this True). The result must then wait for the tensor. In this way, the number
of correct predictions waits for the masks, and each factor waits for the gradient that it multiplies.
The added nodes take almost no time and change no result.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

_LOGIC = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Not"}
_BOOL, _FLOAT = 9, 1  # codes of onnx.TensorProto


def schedule_masks(
    nodes: Sequence[NodeProto], initializers: Sequence[TensorProto], *, batch: str, labels: str, correct: str
) -> list[NodeProto]:
    """Restrict the order of the nodes in an ONNX training step, so that a runtime needs less memory.

    The function adds nodes. They force the runtime to compute the masks of activations, such as `x > 0`, in the forward
    pass. They also delay each factor by which the backward pass multiplies a gradient until this gradient is known. An
    example of a factor is a mask in floating point. Return all nodes in a valid order, in which each node follows the
    nodes that compute its inputs.

    Args:
        nodes: The nodes in a valid order. Masks that the forward pass should compute must precede the loss.
        initializers: The constants of the graph.
        batch: Name of the input with the images or features.
        labels: Name of the input with the labels. Nodes that depend on this input belong to the loss, the backward
            pass or the update.
        correct: Name of the output with the number of correct predictions. This output will also depend on the masks.
    """
    return _Scheduler(nodes, initializers, batch, labels).schedule(correct)


class _Scheduler:
    """Restrict the order of the nodes in an ONNX training step by adding nodes.

    `keyed` contains a pair (key, node) for each added node. The key of the n-th added node is (i, n) if it should run
    directly before node i. `late` contains the indices of the nodes that depend on the labels. `of_batch` contains the
    indices of the nodes that depend on the images or features of the batch.
    """

    def __init__(
        self, nodes: Sequence[NodeProto], initializers: Sequence[TensorProto], batch: str, labels: str
    ) -> None:
        self.nodes = list(nodes)
        self.scalars = {each.name for each in initializers if not each.dims and each.data_type == _FLOAT}
        self.made = {name: index for index, node in enumerate(nodes) for name in node.output}
        self.users: dict[str, list[int]] = {}
        for index, node in enumerate(nodes):
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(index)
        self.late, self.of_batch = self._dependent(labels), self._dependent(batch)
        self.keyed: list[tuple[tuple[int, int], NodeProto]] = []
        self._gates: dict[tuple[str, int], str] = {}

    def schedule(self, correct: str) -> list[NodeProto]:
        """Add nodes that restrict the order, and return all nodes in a valid order.

        If no node computes the value `correct`, return the nodes unchanged.
        """
        if correct not in self.made:
            return self.nodes
        forward = self._ancestors(correct)
        loss = min(index for index in self.late if index in self.of_batch)  # the first node that is a part of the loss
        masks = []
        for index, node in enumerate(self.nodes):
            if index in forward or index in self.late or index not in self.of_batch:
                continue
            # This node computes a mask or a factor for the backward pass, but all its inputs are known in the forward
            # pass. The value from `_gate` delays a factor until the gradient that it multiplies is known.
            if node.op_type == "Cast" and self._is_early_mask(node.input[0], loss):
                masks.append(node.input[0])
                node.input[0] = self._add(index, "And", [node.input[0], self._gate(index, _BOOL)])
            elif index > loss:
                for position, name in enumerate(node.input):
                    if name in self.scalars:
                        node.input[position] = self._add(index, "Mul", [name, self._gate(index, _FLOAT)])
        if masks:
            self._tie(correct, list(dict.fromkeys(masks)))
        return self._sorted()

    def _dependent(self, source: str) -> set[int]:
        """Return the indices of all nodes that depend on the value `source`, directly or through other nodes."""
        names, found = {source}, set()
        for index, node in enumerate(self.nodes):
            if not names.isdisjoint(node.input):
                names.update(node.output)
                found.add(index)
        return found

    def _ancestors(self, name: str) -> set[int]:
        """Return the indices of all nodes that the value `name` depends on, including the node that computes it."""
        found: set[int] = set()
        pending = [self.made[name]]
        while pending:
            index = pending.pop()
            if index not in found:
                found.add(index)
                pending += [self.made[each] for each in self.nodes[index].input if each in self.made]
        return found

    def _is_early_mask(self, name: str, loss: int) -> bool:
        """Return whether a comparison or a logical operator before node `loss` computes the value `name`."""
        index = self.made.get(name, loss)
        return index < loss and self.nodes[index].op_type in _LOGIC

    def _gate(self, index: int, code: int) -> str:
        """Return the name of a scalar 1 (True if `code` is `_BOOL`) that is computed from the size of a gradient.

        The backward pass multiplies this gradient by the result of node `index`, or by a value computed from it. A node
        that uses the scalar cannot run before the gradient is known. `code` is the ONNX code of the scalar's type.
        """
        seen, pending = set(), [index]
        while pending:
            current = pending.pop()
            if current not in seen:
                seen.add(current)
                if current not in self.late:
                    pending += [user for name in self.nodes[current].output for user in self.users.get(name, [])]
        first = min(seen & self.late)
        gradient = next(name for name in self.nodes[first].input if self.made.get(name) in self.late)
        if (gradient, _BOOL) not in self._gates:
            size = self._add(index, "Size", [gradient])
            self._gates[gradient, _BOOL] = self._add(index, "Cast", [size], to=_BOOL)
        if (gradient, code) not in self._gates:
            self._gates[gradient, code] = self._add(index, "Cast", [self._gates[gradient, _BOOL]], to=code)
        return self._gates[gradient, code]

    def _tie(self, correct: str, masks: list[str]) -> None:
        """Multiply the output `correct` by a 1 that is computed from the sizes of all `masks`.

        This output is the number of correct predictions, which the forward pass computes. It now depends on the masks,
        so a runtime must compute the masks in the forward pass, too.
        """
        index = self.made[correct]
        self.nodes[index].output[0] = f"{correct}.counted"
        # By default, ONNX Runtime computes the inputs of a node in descending order of their positions in the file. The
        # `Size` nodes are placed with the last mask first, so that ONNX Runtime computes the first mask first.
        masks.sort(key=self.made.__getitem__, reverse=True)
        sizes = [self._add(index + 1, "Size", [mask]) for mask in masks]
        some = self._add(index + 1, "Cast", [self._add(index + 1, "Max", sizes)], to=_BOOL)
        one = self._add(index + 1, "Cast", [some], to=_FLOAT)
        self._add(index + 1, "Mul", [f"{correct}.counted", one], output=correct)

    def _add(self, index: int, kind: str, inputs: list[str], output: str = "", **attributes: int) -> str:
        """Add a node that should run directly before node `index`, and return the name of its output."""
        from onnx import helper

        name = output or f"order{len(self.keyed)}"
        self.keyed.append(
            ((index, len(self.keyed)), helper.make_node(kind, inputs, [name], name, None, None, None, **attributes))
        )
        return name

    def _sorted(self) -> list[NodeProto]:
        """Return the original and the added nodes in topological order.

        Of the nodes whose inputs are all computed, the node with the smallest key is next. The n-th added node has the
        key (i, n) if it should run before node i. Node i itself has a larger key.
        """
        added = len(self.keyed)
        keyed = self.keyed + [((index, added), node) for index, node in enumerate(self.nodes)]
        made = {name: place for place, (_, node) in enumerate(keyed) for name in node.output}
        waits = [{made[name] for name in node.input if name in made} for _, node in keyed]
        users: list[list[int]] = [[] for _ in keyed]
        for place, sources in enumerate(waits):
            for source in sources:
                users[source].append(place)
        ready = [(key, place) for place, (key, _) in enumerate(keyed) if not waits[place]]
        heapq.heapify(ready)
        found = []
        while ready:
            _, place = heapq.heappop(ready)
            found.append(keyed[place][1])
            for user in users[place]:
                waits[user].discard(place)
                if not waits[user]:
                    heapq.heappush(ready, (keyed[user][0], user))
        return found
