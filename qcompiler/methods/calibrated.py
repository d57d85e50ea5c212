"""Methods that need calibration text: they are given blocks (`qcompiler.calibration.BlockTask`) as well.

A linear that lies in no block, such as the output head, is given to `quantize` as for any other method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcompiler.methods.base import Method

if TYPE_CHECKING:
    import torch

    from qcompiler.calibration.blocks import Block
    from qcompiler.calibration.task import BlockResult, BlockTask


class CalibratedMethod(Method):
    """A method that quantizes block by block on calibration text."""

    @abstractmethod
    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize `task.linears` with the specs in `task.specs`; may tune what `task.tunable()` names.

        Must depend on nothing but the task, so that an interrupted run can be resumed block by block.

        Args:
            task: The block, its calibration inputs, and the method's validated options.
        """

    def block_seconds(
        self,
        block: Block,
        specs: Mapping[str, Any],
        options: Mapping[str, Any],
        windows: int,
        context: int,
        device: torch.device,
    ) -> dict[str, float]:
        """How long `quantize_block` would take, by phase; measures its rates on samples on the device.

        Args:
            block: The block, shapes only.
            specs: Linear name → spec.
            options: The method's options, validated.
            windows: Calibration windows.
            context: Tokens of a window.
            device: Where it would run.

        Returns:
            Phase → seconds; empty where the method cannot tell.
        """
        return {}
