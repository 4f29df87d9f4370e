"""What the generators see of a layer's input, as `modularize(pool=)` is told."""

import copy

import pytest
import torch
from torch import Tensor, nn

import nemo


class Tokens(nn.Module):
    """(B, 6) bytes -> (B, 6, 5); a fused q, k and v, and a Linear that is read by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(4, 12), nn.Linear(4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(x.shape)
        return x + self.down(torch.relu(self.up(x)))


def causal(x: Tensor, first: int) -> Tensor:
    return x[:, :first].mean(1)


def made(pool: object, seed: int = 0) -> nemo.Modular:
    torch.manual_seed(seed)
    modular = nemo.modularize(Tokens(), torch.randint(0, 9, (2, 6)), pool=pool)
    for parameter in modular.generators.parameters():
        nn.init.normal_(parameter)
    return modular


BYTES = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(1))


def gradients(modular: nemo.Modular) -> list[Tensor]:
    modular.zero_grad()
    logits, masks = modular(BYTES)
    (logits.square().sum() + sum(mask.sum() for mask in masks.values())).backward()
    return [p.grad.clone() for p in modular.parameters()]


def test_a_slice_is_the_mean_over_its_positions() -> None:
    modular, same = made(slice(2)), made(lambda layer, x: causal(x, 2))
    (a, masks), (b, theirs) = modular(BYTES), same(BYTES)
    torch.testing.assert_close(a, b)
    assert masks.keys() == theirs.keys() >= {"blocks.1.q", "blocks.1.up"}
    for layer, mask in masks.items():
        torch.testing.assert_close(mask, theirs[layer])
    for mine, other in zip(gradients(modular), gradients(same), strict=True):
        torch.testing.assert_close(mine, other)
    assert not torch.equal(a, made(slice(None))(BYTES)[0])


def test_later_tokens_change_neither_masks_nor_earlier_logits() -> None:
    modular, other = made(slice(2)), BYTES.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 9
    (a, masks), (b, theirs) = modular(BYTES), modular(other)
    assert all(torch.equal(mask, theirs[layer]) for layer, mask in masks.items())
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.equal(a[:, 4:], b[:, 4:])


def test_a_mask_for_each_position_is_made_of_this_position_alone() -> None:
    def pool(layer: str, x: Tensor) -> Tensor:
        assert x.shape == (len(x), 6, 7 if layer.endswith("down") else 4)
        return x if layer.startswith("blocks.1.") else x.mean(1)

    modular = made(pool)
    _, masks = modular(BYTES)
    assert masks["blocks.1.up"].shape == (3, 6, 7)
    x = modular.model.blocks[1]  # the block's Linears again, by hand, on what they were given
    given: dict[str, Tensor] = {}
    handles = [
        getattr(x, name).register_forward_pre_hook(
            lambda m, args, name=name: given.update({name: args[0]})
        )
        for name in ("qkv", "up", "down")
    ]
    put_out: dict[str, Tensor] = {}
    x.up.register_forward_hook(lambda m, args, y: put_out.update(up=y.clone()))
    modular(BYTES)
    for handle in handles:
        handle.remove()
    for name in ("up", "down"):
        w = modular.generators[f"blocks_1_{name}"]
        rows = [w(row) for row in given[name].flatten(0, 1)]
        torch.testing.assert_close(masks[f"blocks.1.{name}"].flatten(0, 1), torch.stack(rows))
    hidden = put_out["up"]  # the user's hook ran before the mask
    torch.testing.assert_close(given["down"], torch.relu(hidden * masks["blocks.1.up"]))
    nemo.contrastive_loss({"up": masks["blocks.1.up"].flatten(0, 1)}, torch.arange(18) % 2, 0.2)
    assert all(gradient is not None for gradient in gradients(modular))


def test_a_model_whose_samples_come_second_shows_them_first() -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(3, 4), nn.Linear(4, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x.transpose(0, 1)))
            return self.head(torch.relu(self.inner(x))).transpose(0, 1)

    first = nemo.modularize(Sequences(), torch.randn(2, 7, 3), pool=slice(2))
    x = torch.randn(5, 7, 3)
    later = torch.cat([x[:, :2], torch.randn(5, 5, 3)], 1)
    assert torch.equal(first(x)[1]["inner"], first(later)[1]["inner"])
    seen: list[tuple[int, ...]] = []

    def pool(layer: str, x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    torch.manual_seed(0)
    x = torch.randn(5, 7, 3)
    modular = nemo.modularize(Sequences(), x[:2], pool=pool)
    logits, masks = modular(x)
    assert logits.shape == (5, 7, 2)
    assert set(seen) <= {(5, 7, 3), (5, 7, 4)}
    assert masks["inner"].shape == (5, 7, 6)
    one, alone = modular(x[3:4])
    torch.testing.assert_close(logits[3:4], one)
    torch.testing.assert_close(masks["inner"][3:4], alone["inner"])


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        (lambda layer, x: x.sum(), r"pool\('blocks\.1\.q', x\) gave \(\); accepted: \(3, 4\) or"),
        (lambda layer, x: x[:, :2], r"gave \(3, 2, 4\); accepted: \(3, 4\) or \(3, 6, 4\)"),
        (lambda layer, x: None, r"gave NoneType; accepted"),
        (slice(6, 9), r"pool slice\(6, 9, None\) holds none of the 6 positions of blocks\.1\.q"),
        (lambda layer, x: x if layer.endswith(".q") else x.mean(1), "some of its parts"),
        (slice(1.5), r"pool: slice\(None, 1\.5, None\); accepted: a slice"),
        ("mean", r"pool: 'mean'; accepted: a slice with a step above 0, or a function"),
        (slice(None, None, -1), r"pool: slice\(None, None, -1\); accepted: a slice with a step"),
    ],
)  # fmt: skip
def test_a_pool_that_does_not_fit_is_named(pool: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(pool)(BYTES)


def test_a_convolution_can_have_a_mask_for_each_pixel_only_where_pixels_stay() -> None:
    def net(stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride, padding=1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
        )  # fmt: skip

    images = torch.randn(2, 3, 8, 8)
    _, masks = nemo.modularize(net(1), images, pool=lambda layer, x: x)(images)
    assert masks["2"].shape == (2, 8, 8, 5)
    modular = nemo.modularize(net(2), images, pool=lambda layer, x: x)
    with pytest.raises(ValueError, match=r"2: a mask for each position is \(2, 5, 8, 8\)"):
        modular(images)


@pytest.mark.parametrize("inner", [False, True])
def test_windows_of_a_sample_are_shown_apart(inner: bool) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x)).unflatten(1, (4, 2))  # (B, windows, 2, 4)
            x = (x.transpose(0, 1) if inner else x).flatten(0, 1)
            x = torch.relu(self.inner(x))
            x = x.unflatten(0, (4, -1)).transpose(0, 1) if inner else x.unflatten(0, (-1, 4))
            return self.head(x.mean((1, 2)))

    def pool(layer: str, x: Tensor) -> Tensor:
        assert layer != "inner" or x.shape == (5, 4, 2, 4)
        return x.flatten(1, -2).mean(1)

    torch.manual_seed(0)
    net, x = Windows(), torch.randn(5, 8, 3)
    mean, same = nemo.modularize(net, x[:3]), nemo.modularize(net, x[:3], pool=pool)
    same.load_state_dict(mean.state_dict())
    (a, masks), (b, theirs) = mean(x), same(x)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(masks["inner"], theirs["inner"])
    with pytest.raises(ValueError, match="inner reads windows of a sample"):
        nemo.modularize(net, x[:3], pool=slice(1))(x)
    per_token = nemo.modularize(net, x[:3], pool=lambda layer, x: x)
    per_token.load_state_dict(mean.state_dict())
    given: list[Tensor] = []
    net.inner.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    put_out: list[Tensor] = []
    net.head.register_forward_pre_hook(lambda m, args: put_out.append(args[0]))
    _, masks = per_token(x)
    (rows,), (pooled,) = given, put_out
    expected = torch.relu(net.inner(rows) * per_token.generators["inner"](rows))
    expected = expected.view(4, 5, 2, 6).transpose(0, 1) if inner else expected.view(5, 4, 2, 6)
    torch.testing.assert_close(pooled, expected.mean((1, 2)))
    assert masks["inner"].shape == (5, 4, 2, 6)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_of_torch_can_be_pooled_over_its_first_tokens(batch_first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=batch_first)]
            self.layers = nn.ModuleList([*layers, *copy.deepcopy(layers)])
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            mask = nn.Transformer.generate_square_subsequent_mask(7)
            for layer in self.layers:
                x = layer(x, src_mask=mask, is_causal=True)
            return self.head(x if batch_first else x.transpose(0, 1))

    torch.manual_seed(0)
    net, x = Encoder(), torch.randn(4, 7, 8)
    first = nemo.modularize(net, x[:2], pool=slice(3))
    for parameter in first.generators.parameters():
        nn.init.normal_(parameter, std=0.5)
    same = nemo.modularize(net, x[:2], pool=lambda layer, x: x[:, :3].mean(1))
    same.load_state_dict(first.state_dict())
    (a, masks), (b, theirs) = first(x), same(x)
    torch.testing.assert_close(a, b)
    assert {"layers.1.self_attn.q", "layers.1.self_attn.out_proj"} <= masks.keys()
    for layer, mask in masks.items():
        torch.testing.assert_close(mask, theirs[layer])
    later = torch.cat([x[:, :3], torch.randn(4, 4, 8)], 1)
    assert all(torch.equal(mask, masks[layer]) for layer, mask in first(later)[1].items())
    each = nemo.modularize(net, x[:2], pool=lambda layer, x: x)
    each.load_state_dict(first.state_dict())
    logits, masks = each(x)
    assert all(mask.shape[:2] == (4, 7) for mask in masks.values())
    one, alone = each(x[2:3])
    torch.testing.assert_close(logits[2:3], one)
    torch.testing.assert_close(
        masks["layers.1.self_attn.out_proj"][2:3], alone["layers.1.self_attn.out_proj"]
    )


def test_a_slice_of_images_is_of_their_rows_and_of_time_first_models_of_time() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(180, 2)
    )
    images = torch.randn(2, 3, 8, 8)
    rows = nemo.modularize(net, images, pool=slice(1, 6, 2))
    same = nemo.modularize(net, images, pool=lambda layer, x: x[:, 1:6:2].mean((1, 2)))
    same.load_state_dict(rows.state_dict())
    torch.testing.assert_close(rows(images)[1]["1"], same(images)[1]["1"])


def test_class_masks_want_a_row_for_each_label() -> None:
    modular = made(lambda layer, x: x)
    with pytest.raises(ValueError, match=r"has shape \(3, 6, .\): expected \(3, N_l\), one row"):
        nemo.class_masks(modular, [(BYTES, torch.tensor([0, 1, 1]))])
