"""What ordinary models are made of and do: examples stay apart."""

from __future__ import annotations

from tests.engine.writer import EITHER, Writer, ingredient


@ingredient(weight=3)
def layer(w: Writer) -> None:
    _, call = w.layer()
    w.add(f"z = {w.pick('torch.tanh', 'F.silu', 'F.relu', 'F.gelu')}({call})")


@ingredient(weight=1)
def residual(w: Writer) -> None:
    _, call = w.layer()
    norm = w.norm()
    w.add(f"z = z + torch.tanh({call})", f"z = self.{norm}(z)")


@ingredient("seq")
def linear_4d(w: Writer) -> None:
    name = w.linear()
    w.add(f"z = torch.tanh(self.{name}(z[:, :, None].expand(-1, -1, 2, -1))).mean(2)")


@ingredient("seq")
def rows_in_the_model(w: Writer) -> None:
    name, norm = w.linear(), w.norm()
    if w.draw.random() < 0.5:
        w.add("n, t, d = z.shape", f"z = torch.tanh(self.{norm}(self.{name}(z.reshape(n * t, d)))).view(n, t, d)")
    else:
        w.add("n, t, d = z.shape", f"z = torch.tanh(self.{norm}(self.{name}(z.transpose(0, 1).reshape(t * n, d))))")
        w.add("z = z.view(t, n, d).transpose(0, 1)")


@ingredient("seq")
def sequence_first(w: Writer) -> None:
    made = w.pick("nn.LSTM(4, 4)", "nn.GRU(4, 4)", "nn.RNN(4, 4)", "nn.MultiheadAttention(4, 2)", "nn.Linear(4, 4)")
    name = w.member(made)
    call = {"MHA": "(s, s, s)[0]", "Lin": "(s)"}.get(made[3:6].replace("Mul", "MHA"), "(s)[0]")
    w.add("s = z.transpose(0, 1)", f"z = torch.tanh(self.{name}{call}).transpose(0, 1)")


@ingredient("seq")
def recurrent(w: Writer) -> None:
    made = w.pick(
        "nn.LSTM(4, 2, batch_first=True, bidirectional=True)",
        "nn.GRU(4, 4, num_layers=2, batch_first=True)",
        "nn.RNN(4, 4, batch_first=True, nonlinearity='relu')",
        "nn.LSTM(4, 4, proj_size=0, num_layers=2, batch_first=True)",
    )
    name = w.member(made, "r")
    if "2, batch_first=True, bi" in made:
        w.add(f"s, (h, _) = self.{name}(z)", "z = s + h.transpose(0, 1).flatten(1)[:, None]")
    else:
        w.add(f"s, h = self.{name}(z)", "z = s + (h[0] if isinstance(h, tuple) else h)[-1][:, None]")


@ingredient("seq vec")
def cells(w: Writer) -> None:
    cell = w.pick("GRUCell", "RNNCell", "LSTMCell")
    name = w.member(f"nn.{cell}(4, 4)", "r")
    steps = "z.unbind(1)" if w.kind == "seq" else "[z, z]"
    w.add("h = z.new_zeros(len(z), 4)")
    if cell == "LSTMCell":
        w.add("c = z.new_zeros(len(z), 4)", f"for s in {steps}:", f"    h, c = self.{name}(s, (h, c))")
    else:
        w.add(f"for s in {steps}:", f"    h = self.{name}(s, h)")
    w.add("z = z + h[:, None]" if w.kind == "seq" else "z = z + h")


@ingredient("seq")
def attention(w: Writer) -> None:
    name = w.member("nn.MultiheadAttention(4, 2, batch_first=True)", "a")
    weights = w.pick("", ", need_weights=False")
    causal = w.pick("", ", attn_mask=torch.ones(3, 3, dtype=torch.bool, device=z.device).triu(1)")
    w.add(f"z = z + self.{name}(z, z, z{weights}{causal})[0]")


@ingredient("seq")
def own_attention(w: Writer) -> None:
    name = w.linear(12)
    if w.draw.random() < 0.5:
        w.add(f"q, k, v = self.{name}(z).chunk(3, -1)")
    else:
        w.add(f"s = self.{name}(z)", "q, k, v = s[..., :4], s[..., 4:8], s[..., 8:]", "q *= 0.5")
    w.add("z = z + (q @ k.mT).softmax(-1) @ v")


@ingredient("seq", weight=0.5)
def encoder_block(w: Writer) -> None:
    order = w.pick("True", "False")
    name = w.member(f"nn.TransformerEncoderLayer(4, 2, 8, dropout=P, batch_first=True, norm_first={order})", "e")
    w.add(f"z = self.{name}(z)")


@ingredient("img")
def convolutions(w: Writer) -> None:
    made = w.pick(
        "nn.Conv2d(4, 4, 3, padding=1, padding_mode='circular')",
        "nn.Conv2d(4, 4, 2, padding='same', dilation=1)",
        "nn.ConvTranspose2d(4, 4, 3, padding=1)",
    )
    name = w.member(made, "c")
    w.add(f"z = torch.tanh(self.{name}(z))")


@ingredient()
def bare_parameter(w: Writer) -> None:
    shape = "4, 1, 1" if w.kind == "img" else "4"
    scale, shift = (
        w.member(f"nn.Parameter(torch.randn({shape}))", "p"),
        w.member(f"nn.Parameter(torch.randn({shape}))", "p"),
    )
    w.add(w.pick(f"z = z * self.{scale} + self.{shift}", f"z = torch.tanh(z * self.{scale}.exp()) - self.{shift}"))


@ingredient("seq")
def class_token(w: Writer) -> None:
    name = w.member("nn.Parameter(torch.randn(1, 1, 4))", "p")
    layer_ = w.linear()
    how = w.pick("expand(len(z), -1, -1)", "repeat(len(z), 1, 1)")
    w.add(f"z = torch.cat([self.{name}.{how}, z], 1)", f"z = torch.tanh(self.{layer_}(z))", "z = z[:, 1:] + z[:, :1]")


@ingredient("seq")
def positions(w: Writer) -> None:
    name = w.member("nn.Embedding(5, 4)", "e")
    ids = w.pick("torch.arange(3)", "torch.arange(3)[None]", "torch.arange(3).expand(len(z), -1)")
    w.add(f"z = z + self.{name}({ids})")


@ingredient()
def buckets(w: Writer) -> None:
    name = w.member("nn.Embedding(6, 4)", "e")
    w.add("ids = (z.flatten(1).mean(1).abs() * 3).long().clamp(0, 5)", f"h = self.{name}(ids)")
    w.add({"vec": "z = z + h", "seq": "z = z + h[:, None]", "img": "z = z + h[:, :, None, None]"}[w.kind])


@ingredient("vec seq")
def parameter_list(w: Writer) -> None:
    name = w.member("nn.ParameterList([torch.randn(4, 4) / 2 for _ in range(2)])", "ws")
    w.add(f"for weight in self.{name}:", "    z = torch.tanh(z @ weight)")


@ingredient("vec seq")
def parameter_list_of_a_part(w: Writer) -> None:
    part = w.name("Part")
    w.top += [
        f"class {part}(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        "        self.ws = nn.ParameterDict({'a': torch.randn(4, 4) / 2, 'b': torch.randn(4)})",
        "    def forward(self, x):",
        "        return torch.tanh(x @ self.ws['a'] + self.ws['b'])",
    ]
    name = w.member(f"{part}()", "p")
    w.add(f"z = self.{name}(z)")


@ingredient("vec seq")
def tied(w: Writer) -> None:
    one, other = w.member("nn.Linear(4, 4)"), w.member("nn.Linear(4, 4, bias=False)")
    w.init.append(f"self.{other}.weight = self.{one}.weight")
    w.add(f"z = self.{other}(torch.tanh(self.{one}(z)))")


@ingredient()
def reused(w: Writer) -> None:
    _, call = w.layer()
    w.add(f"for _ in range({w.pick('2', '3')}):", f"    z = torch.tanh({call})")
    if w.draw.random() < 0.3:
        w.add(f"z = z + {call}")


@ingredient()
def reused_block(w: Writer) -> None:
    name = w.member(f"nn.Sequential({_ctor(w)}, nn.Tanh(), {_ctor(w)})", "b")
    w.add(f"z = z + self.{name}(z)", f"z = self.{name}(z)")


@ingredient()
def checkpointed(w: Writer) -> None:
    reentrant = w.pick("True", "False")
    name = w.member(f"nn.Sequential({_ctor(w)}, nn.Tanh(), {_ctor(w)})", "b")
    w.add(f"z = checkpoint(self.{name}, z, use_reentrant={reentrant})")


@ingredient("vec seq", weight=0.5)
def checkpointed_function(w: Writer) -> None:
    one, other = w.linear(), w.linear()
    reentrant = w.pick("True", "False")
    w.add(
        "def run(s):",
        f"    s = self.{one}(s)",
        f"    {w.pick('s = s.relu()', 's.relu_()', 's += 1.0')}",
        f"    return self.{other}(s)",
        f"z = checkpoint(run, z, use_reentrant={reentrant})",
    )


def _ctor(w: Writer) -> str:
    if w.kind == "img":
        return w.pick("nn.Conv2d(4, 4, 3, padding=1)", "nn.GroupNorm(2, 4)", "nn.Conv2d(4, 4, 1, bias=False)")
    return w.pick("nn.Linear(4, 4)", "nn.Linear(4, 4, bias=False)", "nn.LayerNorm(4)")


@ingredient()
def dropout(w: Writer) -> None:
    if w.draw.random() < 0.5:
        name = w.member("nn.Dropout(P)", "d")
        w.add(f"z = self.{name}(z)")
    else:
        w.add("z = F.dropout(z, P, self.training)")


@ingredient()
def layer_drop(w: Writer) -> None:
    _, call = w.layer()
    w.add("if not self.training or torch.rand(()) >= P:", f"    z = z + torch.tanh({call})")


@ingredient()
def frozen_layer(w: Writer) -> None:
    name, call = w.layer(plain=True)
    if w.draw.random() < 0.5:
        w.init.append(f"self.{name}.weight.requires_grad_(False)")
    else:
        w.init.append(f"self.{name}.requires_grad_(False)")
    w.add(f"z = torch.tanh({call})")


@ingredient("vec seq")
def adapter(w: Writer) -> None:
    base, down, up = (
        w.member("nn.Linear(4, 4)"),
        w.member("nn.Linear(4, 2, bias=False)"),
        w.member("nn.Linear(2, 4, bias=False)"),
    )
    w.init.append(f"self.{base}.requires_grad_(False)")
    w.add(f"z = torch.tanh(self.{base}(z) + self.{up}(self.{down}(z)))")


@ingredient()
def views(w: Writer) -> None:
    if w.kind == "img":
        name = w.member("nn.Conv2d(4, 8, 1)", "c")
        axis = "1"
    else:
        name, axis = w.linear(8), "-1"
    cut = w.pick(f"chunk(2, {axis})", f"split(4, {axis})", f"tensor_split(2, {axis})")
    w.add(f"a, b = self.{name}(z).{cut}", f"z = {w.pick('a * torch.sigmoid(b)', 'torch.tanh(a) + b', 'F.silu(b) * a')}")


@ingredient("vec seq")
def sliced_output(w: Writer) -> None:
    name = w.linear()
    how = w.pick("s[..., :2] = 0.0", "s[..., 1] *= 3.0", "s[..., :2] += s[..., 2:]", "s.select(-1, 0).fill_(1.0)")
    w.add(f"s = self.{name}(z).clone()", how, "z = torch.tanh(s)")


@ingredient("vec seq")
def functional(w: Writer) -> None:
    name = w.linear()
    bias = f"self.{name}.bias"
    form = w.pick(
        f"F.linear(z, self.{name}.weight, {bias})",
        f"z @ self.{name}.weight.t()",
        f"F.linear(z, self.{name}.weight.t())",
        f"F.linear(z, self.{name}.weight * 2.0)",
        f"z @ self.{name}.weight[:2].mT @ self.{name}.weight[2:]",
        f"torch.einsum('...d,ed->...e', z, self.{name}.weight)",
    )
    if w.draw.random() < 0.5:
        form = f"self.{name}(z) + {form}"
    w.add(f"z = torch.tanh({form})")


@ingredient("vec seq", weight=0.5)
def functional_of_another(w: Writer) -> None:
    """A layer that multiplies by the weight of another, which it does not own (a head tied by F.linear)."""
    part = w.name("Head")
    w.top += [
        f"class {part}(nn.Module):",
        "    def __init__(self, other):",
        "        super().__init__()",
        "        self.other = [other]",
        "        self.scale = nn.Parameter(torch.ones(4))",
        "    def forward(self, x):",
        f"        return F.linear(x, self.other[0].weight{w.pick('', '.t()')}) * self.scale",
    ]
    name = w.linear()
    head = w.member(f"{part}(self.{name})", "h")
    w.add(f"z = self.{head}(torch.tanh(self.{name}(z)))")


@ingredient("vec seq", weight=0.5)
def weight_norm(w: Writer) -> None:
    made = w.pick("weight_norm", "weight_norm", "orthogonal")
    name = w.member(f"nn.utils.parametrizations.{made}(nn.Linear(4, 4))")
    w.add(f"z = torch.tanh(self.{name}(z))")


@ingredient("vec seq", EITHER, weight=0.3)
def straight_through(w: Writer) -> None:
    name = w.member("nn.Parameter(torch.randn(4, 4))", "w")
    w.top += [
        "class Sign(torch.autograd.Function):",
        "    @staticmethod",
        "    def forward(ctx, weight):",
        "        return weight.sign()",
        "    @staticmethod",
        "    def backward(ctx, grad):",
        "        return grad",
    ]
    w.add(f"z = torch.tanh(z @ Sign.apply(self.{name}))")


@ingredient()
def plain_attribute(w: Writer) -> None:
    shape = "4, 1, 1" if w.kind == "img" else "4"
    name = w.member(f"torch.rand({shape})", "mask")
    w.add(f"z = z * self.{name}")


@ingredient("vec seq")
def experts(w: Writer) -> None:
    one, other = w.linear(), w.linear()
    w.add("s = z.reshape(-1, 4)", "chosen = s[:, 0] > 0", "out = torch.zeros_like(s)")
    if w.draw.random() < 0.5:
        w.add(f"out[chosen] = self.{one}(s[chosen])", f"out[~chosen] = self.{other}(s[~chosen])")
    else:
        w.add(f"for mask, expert in ((chosen, self.{one}), (~chosen, self.{other})):")
        w.add("    rows = mask.nonzero().squeeze(1)", "    out = out.index_add(0, rows, expert(s[rows]))")
    w.add("z = out.view(z.shape)")


@ingredient("vec seq")
def experts_apart(w: Writer) -> None:
    part = w.name("Experts")
    w.top += [
        f"class {part}(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        "        self.gate = nn.Linear(4, 2)",
        "        self.parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])",
        "    def forward(self, x):",
        "        s = x.reshape(-1, 4)",
        "        weight, index = self.gate(s).softmax(-1).max(-1)",
        "        out = torch.zeros_like(s)",
        "        for number, part in enumerate(self.parts):",
        "            rows = (index == number).nonzero().squeeze(1)",
        "            out = out.index_add(0, rows, part(s[rows]) * weight[rows, None])",
        "        return out.view(x.shape)",
    ]
    name = w.member(f"{part}()", "x")
    w.add(f"z = z + self.{name}(z)")


@ingredient(weight=0.5)
def harmless_branch(w: Writer) -> None:
    _, call = w.layer()
    w.add("if len(z) == 1:", "    z = z.clone()", "if z.shape[0] > 0:", f"    z = torch.tanh({call})")


@ingredient(weight=0.7)
def sorted_and_back(w: Writer) -> None:
    _, call = w.layer()
    order = w.pick(
        "z.flatten(1)[:, 0].argsort()", "torch.arange(len(z) - 1, -1, -1)", "(torch.arange(len(z)) + 1) % len(z)"
    )
    w.add(f"order = {order}", "z = z[order]", f"z = torch.tanh({call})[order.argsort()]")
