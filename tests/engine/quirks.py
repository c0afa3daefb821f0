"""What people do around the layers: in-place operations, hooks, side channels, inner gradients. Examples stay apart."""

from __future__ import annotations

from tests.engine.writer import EITHER, Writer, ingredient


@ingredient(weight=3)
def in_place(w: Writer) -> None:
    """An operation in place on what a layer returned."""
    _, call = w.layer()
    how = w.pick(
        "z.relu_()",
        "z.tanh_()",
        "z.mul_(0.7)",
        "z += 1.0",
        "z *= 2.0",
        "F.relu(z, inplace=True)",
        "z.clamp_(-1.0, 1.0)",
        "z.sigmoid_()",
        "z.masked_fill_(z > 0.5, 0.0)",
        "z.add_(z.detach())",
        "z.neg_()",
        "z.div_(2.0)",
        "F.silu(z, inplace=True)",
    )
    w.add(f"z = {call}", how)


@ingredient(weight=2)
def in_place_module(w: Writer) -> None:
    _, call = w.layer()
    name = w.member(f"nn.{w.pick('ReLU', 'SiLU', 'ELU', 'LeakyReLU', 'Hardtanh')}(inplace=True)", "f")
    w.add(f"z = self.{name}({call})")


@ingredient(weight=2)
def in_place_residual(w: Writer) -> None:
    _, call = w.layer()
    w.add(
        "r = torch.tanh(z)",
        f"z = {call}",
        w.pick("z += r", "z.add_(r)", "z *= r", "z.sub_(r, alpha=0.5)", "z.copy_(r + 2 * z)"),
    )


@ingredient(weight=2)
def read_then_in_place(w: Writer) -> None:
    """The output is used, then changed."""
    _, call = w.layer()
    axis = {"vec": "1", "seq": "1", "img": "2"}[w.kind]
    how = w.pick(
        "z[:, 0] = 0.0", "z[:, :1] *= 3.0", "z += m", "z.masked_fill_(mask, 0.5)", "z[:, -1].zero_()", "z.mul_(0.5)"
    )
    w.add(f"z = {call}", f"m = z.mean({axis}, keepdim=True)", "mask = z.detach() > 0", how, "z = torch.tanh(z) + m")


@ingredient("vec seq", weight=2)
def view_in_place(w: Writer) -> None:
    """A view of an output is changed, the output is used."""
    _, call = w.layer()
    view = w.pick(
        "s[:, 0]",
        "s[..., :2]",
        "s.view(len(s), -1)[:, 1]",
        "s.narrow(-1, 1, 2)",
        "s.select(-1, 1)",
        "s.unsqueeze(1)[:, 0]",
    )
    how = w.pick("v.mul_(2.0)", "v.relu_()", "v += 1.0", "v.zero_()", "v.tanh_()")
    w.add(f"s = {call}", f"v = {view}", how, "z = torch.tanh(s)")


@ingredient("vec seq")
def glu_in_place(w: Writer) -> None:
    name = w.linear(8)
    w.add(
        f"s = self.{name}(z)",
        "a, b = s[..., :4], s[..., 4:]",
        w.pick("a *= b.sigmoid()", "b.sigmoid_()", "a += 1.0"),
        "z = a * b",
    )


@ingredient()
def input_in_place(w: Writer) -> None:
    """What a layer took is changed after it ran, by addition, which saves nothing."""
    _, call = w.layer()
    w.add(
        "z = z * 1.0", f"s = torch.tanh({call})", "z = z.clone() if not torch.is_grad_enabled() else z + 0.0", "z += s"
    )


@ingredient()
def adds_to_its_input(w: Writer) -> None:
    """A module that changes its input in place and returns it."""
    part = w.name("Shift")
    shape = "4, 1, 1" if w.kind == "img" else "4"
    w.top += [
        f"class {part}(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        f"        self.b = nn.Parameter(torch.randn({shape}))",
        "    def forward(self, x):",
        f"        {w.pick('x += self.b', 'x.add_(self.b)', 'x.sub_(2 * self.b)')}",
        "        return x",
    ]
    name = w.member(f"{part}()", "s")
    w.add("z = z + 0.0", f"z = torch.tanh(self.{name}(z))")


@ingredient()
def returns_its_input(w: Writer) -> None:
    """A module that keeps what it computed and returns what it was given."""
    part, inner = w.name("Tap"), _small(w)
    w.top += [
        f"class {part}(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        f"        self.l = {inner}",
        "    def forward(self, x):",
        "        self.kept = self.l(x)",
        "        return x",
    ]
    name = w.member(f"{part}()", "t")
    w.add(f"z = self.{name}(z)", f"z = z + torch.tanh(self.{name}.kept)")


@ingredient(weight=0.5)
def identity_with_parameters(w: Writer) -> None:
    """A module that hands its input through, whatever it owns, but for a list it fills."""
    part, inner = w.name("Collect"), _small(w)
    w.top += [
        f"class {part}(nn.Module):",
        "    def __init__(self, into):",
        "        super().__init__()",
        f"        self.l = {inner}",
        "        self.into = into",
        "    def forward(self, x):",
        "        self.into.append(self.l(x).flatten(1).square().mean(1))",
        "        return x",
    ]
    w.init.append("self.collected = []")
    name = w.member(f"{part}(self.collected)", "t")
    w.add("self.collected.clear()", f"z = self.{name}(z)")
    w.terms.append("value = value + 0.3 * fold(sum(model.collected))")


def _small(w: Writer) -> str:
    return "nn.Conv2d(4, 4, 1)" if w.kind == "img" else "nn.Linear(4, 4)"


@ingredient()
def kept_attribute(w: Writer) -> None:
    _, call = w.layer()
    name = w.name("side")
    w.add(f"self.{name} = {call}", f"z = torch.tanh(self.{name})")
    w.terms.append(f"value = value + 0.2 * fold(model.{name}.flatten(1).square().mean(1))")


@ingredient()
def auxiliary_loss_in_training(w: Writer) -> None:
    _, call = w.layer()
    kept = w.name("aux")
    w.add("if self.training:", f"    self.{kept} = torch.tanh({call}).flatten(1).square().sum(1)")
    w.terms.append(f"value = value + 0.2 * fold(model.{kept}) if model.training else value")


@ingredient()
def only_in_training(w: Writer) -> None:
    _, call = w.layer()
    w.add("if self.training:", f"    z = z + torch.tanh({call})")


@ingredient(weight=2)
def kept_by_a_hook(w: Writer) -> None:
    """A feature that the user's own hook keeps, and a loss on it."""
    name, call = w.layer(plain=True)
    w.top.append("FEATURES = {}")
    _register(w, name, f"lambda module, args, out: FEATURES.__setitem__({name!r}, out)")
    w.add(f"z = torch.tanh({call})")
    w.terms.append(f"value = value + 0.3 * fold(FEATURES[{name!r}].flatten(1).square().mean(1))")


@ingredient(weight=2)
def replaced_by_a_hook(w: Writer) -> None:
    name, call = w.layer(plain=True)
    new = w.pick(
        "out * 2.0", "torch.tanh(out)", "out.clone()", "out.relu_()", "out + 1.0", "out.view_as(out)", "out.mul_(3.0)"
    )
    _register(w, name, f"lambda module, args, out: {new}")
    w.add(f"z = torch.tanh({call})")


@ingredient()
def read_by_a_hook(w: Writer) -> None:
    name, call = w.layer(plain=True)
    w.top += ["SEEN = []", "def see(module, args, out):", "    SEEN.append(float(out.detach().sum()))"]
    _register(w, name, "see")
    w.add(f"z = torch.tanh({call})")


@ingredient()
def input_by_a_hook(w: Writer) -> None:
    name, call = w.layer(plain=True)
    where = w.draw.random() < 0.5
    line = f".{name}.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))"
    w.init.append("self" + line) if where else w.after.append("model" + line)
    w.add(f"z = torch.tanh({call})")


@ingredient(weight=0.5)
def backward_hook(w: Writer) -> None:
    name, call = w.layer(plain=True)
    made = w.pick("lambda module, gi, go: None", "lambda module, gi, go: (None if gi[0] is None else gi[0] * 0.5,)")
    line = f".{name}.register_full_backward_hook({made})"
    w.init.append("self" + line) if w.draw.random() < 0.5 else w.after.append("model" + line)
    w.add(f"z = torch.tanh({call})")


@ingredient(weight=0.7)
def gradient_hook(w: Writer) -> None:
    _, call = w.layer()
    w.add(
        f"z = {call}",
        "if z.requires_grad:",
        f"    z.register_hook(lambda g: {w.pick('g * 0.5', '-g', 'g.clone()')})",
        "z = torch.tanh(z)",
    )


@ingredient(weight=0.5)
def scaled_gradient(w: Writer) -> None:
    """Gradient reversal, as domain adaptation does it."""
    _, call = w.layer()
    w.top += [
        "class Reverse(torch.autograd.Function):",
        "    @staticmethod",
        "    def forward(ctx, x):",
        f"        return {w.pick('x.view_as(x)', 'x.clone()')}",
        "    @staticmethod",
        "    def backward(ctx, grad):",
        "        return -0.5 * grad",
    ]
    w.add(f"z = torch.tanh(Reverse.apply({call}))")


@ingredient(weight=0.7)
def detached(w: Writer) -> None:
    _, call = w.layer()
    w.add(
        f"s = {call}",
        w.pick("z = torch.tanh(s) + s.detach()", "z = torch.tanh(s) * torch.sigmoid(s).detach()", "z = z.detach() + s"),
    )


@ingredient(weight=0.3)
def no_grad_pass(w: Writer) -> None:
    """A teacher: the same layer, first without gradients."""
    _, call = w.layer()
    w.add("with torch.no_grad():", f"    teacher = {call}", f"z = torch.tanh({call}) - teacher")


def _register(w: Writer, name: str, hook: str) -> None:
    line = f".{name}.register_forward_hook({hook})"
    w.init.append("self" + line) if w.draw.random() < 0.5 else w.after.append("model" + line)


@ingredient(verdict=EITHER, weight=0.4)
def counter(w: Writer) -> None:
    """A state that a pass leaves behind, harmless or not: it may be refused until it is named."""
    name = w.name("calls")
    how = w.pick("buffer", "python")
    w.init.append(f"self.register_buffer({name!r}, torch.zeros(()))" if how == "buffer" else f"self.{name} = 0")
    w.add(f"self.{name} += 1")


@ingredient(verdict=EITHER, weight=0.4)
def statistics_kept(w: Writer) -> None:
    """Running statistics that no training pass uses."""
    name = w.name("mean")
    w.init.append(f"self.register_buffer({name!r}, torch.zeros(()))")
    w.add(
        "if self.training:",
        f"    self.{name}.mul_(0.9).add_(0.1 * z.detach().mean())",
        "else:",
        f"    z = z - self.{name}",
    )


@ingredient(weight=0.7)
def attack(w: Writer) -> None:
    """Adversarial examples, as the loss makes them."""
    inner = w.pick("reduction='sum'", "reduction='none'")
    total = "" if "sum" in inner else ".sum()"
    w.before += [
        "if x.is_floating_point():",
        "    tried = x.clone().requires_grad_()",
        f"    (slope,) = torch.autograd.grad(F.cross_entropy(model(tried), target, {inner}){total}, tried)",
        f"    x = (x + 0.1 * slope{w.pick('.sign()', '')}).detach()",
    ]


@ingredient(verdict=EITHER, weight=0.5)
def gradient_penalty(w: Writer) -> None:
    w.before += ["if x.is_floating_point():", "    x = x.clone().requires_grad_()"]
    w.terms += [
        "if x.requires_grad:",
        "    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)",
        "    value = value + 0.1 * fold(slope.flatten(1).square().sum(1))",
    ]


@ingredient(weight=0.4)
def called_twice(w: Writer) -> None:
    """Consistency of two passes."""
    w.terms.append("value = value + 0.1 * fold((model(x) - 2.0 * logits.detach()).square().sum(1))")
