"""What mixes the examples of a batch, or lets one reach into a later step: to be refused."""

from __future__ import annotations

from tests.engine.writer import MIXED, Writer, ingredient


def mixed(kinds: str = "vec seq img", weight: float = 1.0):
    """An ingredient that no clipping protects."""
    return ingredient(kinds, MIXED, weight)


@mixed()
def batch_mean(w: Writer) -> None:
    how = w.pick(
        "z - z.mean(0)",
        "z - 0.5 * z.mean(0, keepdim=True)",
        "z / (1 + z.square().mean().sqrt())",
        "z * z.detach().std()",
    )
    w.add(f"z = {how}")


@mixed()
def batch_mean_in_training(w: Writer) -> None:
    how = w.pick(
        "z = z - z.mean(0)",
        "z = 0.6 * z + 0.4 * z.roll(1, 0)",
        "z = 0.6 * z + 0.4 * z.flip(0)",
        "z = z * z.detach().abs().mean()",
    )
    w.add("if self.training:", f"    {how}")


@mixed()
def own_batch_norm(w: Writer) -> None:
    w.init += ["self.register_buffer('bm', torch.zeros(4))", "self.register_buffer('bv', torch.ones(4))"]
    call = "F.batch_norm({}, self.bm, self.bv, training=self.training)"
    w.add("z = " + (call.format("z.mT") + ".mT" if w.kind == "seq" else call.format("z")))


@mixed()
def softmax_over_batch(w: Writer) -> None:
    w.add(
        w.pick(
            "z = z.softmax(0)",
            "z = z * z.detach().softmax(0)",
            "z = z / z.abs().amax(0)",
            "z = z.cumsum(0)",
            "z = z - z[:1]",
            "z = F.normalize(z, dim=0)",
        )
    )


@mixed("vec seq")
def attention_over_batch(w: Writer) -> None:
    name = w.linear()
    w.add("s = z.flatten(1)", f"z = z + ((s @ s.mT).softmax(-1) @ self.{name}(z).flatten(1)).view(z.shape)")


@mixed("seq")
def batch_and_time_confused(w: Writer) -> None:
    """A layer for (T, B, d) that is given (B, T, d)."""
    name = w.member(w.pick("nn.LSTM(4, 4)", "nn.GRU(4, 4)", "nn.MultiheadAttention(4, 2)"), "r")
    attends = "Multi" in w.init[-1]
    w.add(f"z = z + self.{name}({'z, z, z' if attends else 'z'})[0]")


@mixed()
def hidden_by_zero(w: Writer) -> None:
    """What mixes is multiplied by a parameter that starts at zero."""
    name = w.member("nn.Parameter(torch.zeros(()))", "gamma")
    w.add(f"z = z + self.{name} * {w.pick('z.mean(0)', 'z.roll(1, 0)', 'z.flip(0)')}")


@mixed()
def above_a_threshold(w: Writer) -> None:
    """Only an extreme example reaches the others."""
    w.add(
        w.pick(
            "z = z / z.abs().max().clamp(min=4.0)",
            "z = z + (z - 3.0).relu().mean(0)",
            "if z.abs().max() > 4.0:\n            z = z * 0.1",
        )
    )


@mixed()
def depends_on_batch_size(w: Writer) -> None:
    w.add(
        w.pick(
            "z = z * len(z)",
            "if len(z) > 4:\n            z = 3.0 * z",
            "z = z / z.shape[0] ** 0.5",
            "if len(z) % 2:\n            z = -z",
        )
    )


@mixed()
def branch_on_values(w: Writer) -> None:
    w.add(
        w.pick(
            "if z.sum() > 0:\n            z = -z",
            "z = z if float(z.detach().mean()) > 0 else 2.0 * z",
            "if (z.detach() > 1.0).any():\n            z = 0.1 * z",
        )
    )


@mixed()
def gradient_mixed(w: Writer) -> None:
    """Forward keeps examples apart; backward does not."""
    how = w.pick(
        "g - g.mean(0)",
        "g / (g.norm() + 1e-6)",
        "g + g.roll(1, 0)",
        "g.flip(0)",
        "g * g.abs().max().clamp(min=1.0)",
        "g.clamp(-0.01, 0.01)",
    )
    _, call = w.layer()
    w.add(f"z = {call}", "if z.requires_grad:", f"    z.register_hook(lambda g: {how})", "z = torch.tanh(z)")


@mixed(weight=0.5)
def gradient_mixed_by_function(w: Writer) -> None:
    w.top += [
        "class Center(torch.autograd.Function):",
        "    @staticmethod",
        "    def forward(ctx, x):",
        "        return x.clone()",
        "    @staticmethod",
        "    def backward(ctx, grad):",
        f"        return {w.pick('grad - grad.mean(0)', 'grad / (grad.norm() + 1e-6)', 'grad.flip(0)')}",
    ]
    _, call = w.layer()
    w.add(f"z = torch.tanh(Center.apply({call}))")


@mixed()
def mixed_by_a_hook(w: Writer) -> None:
    name, call = w.layer(plain=True)
    how = w.pick(
        "out - out.mean(0)", "out + 0.5 * out.roll(1, 0)", "out.sub_(out.mean(0))", "out.mul_(out.detach().abs().max())"
    )
    line = f".{name}.register_forward_hook(lambda module, args, out: {how})"
    w.init.append("self" + line) if w.draw.random() < 0.7 else w.after.append("model" + line)
    w.add(f"z = torch.tanh({call})")


@mixed()
def kept_from_the_last_pass(w: Writer) -> None:
    """What one step leaves behind changes the gradients of the next."""
    name = w.name("center")
    kind = w.pick("buffer", "python", "list")
    if kind == "buffer":
        w.init.append(f"self.register_buffer({name!r}, torch.zeros(()))")
        w.add(f"z = z - self.{name}", f"self.{name}.mul_(0.5).add_(0.5 * z.detach().mean())")
    elif kind == "python":
        w.init.append(f"self.{name} = 0.0")
        w.add(f"z = z * (1.0 + self.{name})", f"self.{name} = 0.5 * self.{name} + float(z.detach().abs().mean())")
    else:
        w.init.append(f"self.{name} = []")
        w.add(f"z = z + sum(self.{name}, 0.0)", f"self.{name}.append(z.detach().mean())", f"del self.{name}[:-3]")


@mixed()
def loss_of_the_batch(w: Writer) -> None:
    w.terms.append(
        w.pick(
            "value = value.mean().expand(len(value))",
            "value = value + value.detach().mean() * value",
            "value = value * value.detach().softmax(0) * len(value)",
            "value = (value - value.mean()).square()",
            "value = value.roll(1, 0) * value",
            "value = value.cumsum(0)",
            "value = value / value.detach().sum()",
        )
    )


@mixed()
def class_weights_of_the_batch(w: Writer) -> None:
    w.terms.append(
        w.pick(
            "value = value / torch.tensor([1.0, 3.0, 9.0])[batch['y']].sum()",
            "value = value / (batch['y'][:, None] == batch['y'][None]).sum(1)",
            "value = value / torch.bincount(batch['y'], minlength=3)[batch['y']]",
            "value = value * len(value) / (batch['y'] != 0).sum().clamp(min=1)",
            "value = value * (batch['y'].float().mean() > 1)",
        )
    )


@mixed()
def contrastive(w: Writer) -> None:
    same = w.draw.random() < 0.5
    w.terms.append("unit = F.normalize(logits.view(len(value), -1), dim=1)")
    if same:
        w.terms.append("value = value + 0.5 * ((unit @ unit.mT) * (batch['y'][:, None] == batch['y'][None])).sum(1)")
    else:
        w.terms.append(
            "value = value + F.cross_entropy(unit @ unit.mT / 0.2, torch.arange(len(value)), reduction='none')"
        )


@mixed(weight=0.5)
def pairs_of_neighbours(w: Writer) -> None:
    w.terms.append(
        "value = value + (logits.view(len(value), -1) - logits.view(len(value), -1).roll(1, 0)).square().sum(1)"
    )


@mixed(weight=0.5)
def labels_mixed(w: Writer) -> None:
    w.terms.extend(
        (
            "rows = logits.view(len(value), -1)[:, :3]",
            "value = 0.7 * value + 0.3 * F.cross_entropy(rows, batch['y'].flip(0) % rows.shape[1], reduction='none')",
        )
    )


@mixed(weight=0.6)
def capacity(w: Writer) -> None:
    """Rows beyond an expert's capacity are dropped."""
    if w.kind == "img":
        w.add("keep = (z.flatten(1).sum(1) > 0).long().cumsum(0) <= 2", "z = z * keep[:, None, None, None]")
    else:
        name = w.linear()
        w.add(
            "s = z.reshape(-1, 4)",
            "rows = (s[:, 0] > 0).nonzero().squeeze(1)[:3]",
            f"z = s.index_add(0, rows, self.{name}(s[rows])).view(z.shape)",
        )


@mixed(weight=0.5)
def side_channel_mixed(w: Writer) -> None:
    _, call = w.layer()
    kept = w.name("side")
    w.add(f"self.{kept} = {call}")
    w.terms.extend(
        (
            f"rows = model.{kept}.flatten(1)",
            "value = value + 0.3 * (rows - rows.mean(0)).square().sum(1)[: len(value)]",
        )
    )


@mixed(weight=0.5)
def rows_reordered(w: Writer) -> None:
    _, call = w.layer()
    w.add("order = z.detach().flatten(1)[:, 0].argsort()", f"z = torch.tanh({call})[order]")
