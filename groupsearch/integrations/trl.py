"""TRL's SFTTrainer, private, on padded examples that are not packed."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from groupsearch.integrations.privacy import refuse
from groupsearch.integrations.transformers import PrivateMixin, base_model


class PrivateSFTTrainer(PrivateMixin, SFTTrainer):
    """TRL's SFTTrainer with the two arguments of :class:`~groupsearch.integrations.transformers.PrivateMixin`.

    An example's loss is the mean over its own tokens; TRL's is that over all tokens of a batch, which mixes examples.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TRL's fused head is a forward bound to this very model: a copy, which is what is traced, would run this one.
        vars(base_model(self.model)).pop("forward", None)

    def check_private(self) -> None:
        """Refuse what mixes examples in TRL, too.

        Raises:
            GroupSearchError: naming what was found.
        """
        super().check_private()
        args, alone = self.args, "a row must be one example, and no other; set it to False, and examples are padded."
        refuse(
            "TRL's SFTTrainer",
            {
                "packing": (args.packing or bool(args.eval_packing), alone),
                "padding_free": (args.padding_free, alone),
                "loss_type": (args.loss_type != "nll", "examples have the usual loss; give loss= for another one."),
                "activation_offloading": (args.activation_offloading, "its step is not taken; leave it out."),
                "router_aux_loss_coef": (self.aux_loss_enabled, "it balances experts over a batch; set it to 0."),
            },
        )
