"""A plain transcription of the released training step (docs/method.md, sections 2 and 3), to measure against.
Not used by the project itself.

As the released code works: tokens are permuted in every block, keys and values are projected for every token,
every subnet is run a second time for the log-determinant, batches come out of a DataLoader one image at a
time, one class after the other."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Attention(nn.Module):
    """Class attention with every token projected: x (B, d), p (B, N, d) -> (B, H)."""

    def __init__(self, d, hidden, heads=4):
        super().__init__()
        self.heads, self.scale = heads, (d // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.proj = nn.Linear(d, hidden)

    def forward(self, x, p):
        tokens = torch.cat([x.unsqueeze(1), p], 1)
        batch, n, d = tokens.shape
        q = self.q(x).reshape(batch, 1, self.heads, d // self.heads).transpose(1, 2) * self.scale
        k = self.k(tokens).reshape(batch, n, self.heads, d // self.heads).transpose(1, 2)
        v = self.v(tokens).reshape(batch, n, self.heads, d // self.heads).transpose(1, 2)
        weights = (q @ k.transpose(2, 3)).softmax(3)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, d))


class Subnet(nn.Module):
    def __init__(self, d, out, hidden):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(n, hidden) for n in (d, hidden, hidden))
        self.fusion, self.gamma = Attention(d, hidden), nn.Parameter(torch.ones(hidden))
        self.fc_out = nn.Linear(2 * hidden, out)

    def forward(self, x, p):
        h = self.fc3(self.fc2(self.fc1(x).relu()).relu()).relu()
        return self.fc_out(torch.cat([h, self.fusion(x, p) * self.gamma], 1))


class Block(nn.Module):
    def __init__(self, channels, hidden, seed, clamp):
        super().__init__()
        self.order = torch.from_numpy(np.random.RandomState(seed).permutation(channels))
        self.split, self.clamp = channels // 2, clamp
        self.s1 = Subnet(self.split, 2 * (channels - self.split), hidden)
        self.s2 = Subnet(channels - self.split, 2 * self.split, hidden)

    def log_scale(self, s):
        return self.clamp * 0.636 * torch.atan(s / self.clamp)

    def couple(self, x, p):
        x, p = x[:, self.order], p[:, :, self.order]
        x1, x2, p1, p2 = x[:, : self.split], x[:, self.split :], p[..., : self.split], p[..., self.split :]
        s2, t2 = self.s2(x2, p2).chunk(2, 1)
        y1 = torch.exp(self.log_scale(s2)) * x1 + t2
        s1, t1 = self.s1(y1, p1).chunk(2, 1)
        y2 = torch.exp(self.log_scale(s1)) * x2 + t1
        log_det = self.log_scale(s1).sum(1) + self.log_scale(s2).sum(1)
        return torch.cat([y1, y2], 1).clamp(-1e6, 1e6), p, log_det

    def forward(self, x, p):
        y, permuted, _ = self.couple(x, p)
        log_det = self.couple(x, p)[2]  # the released code asks for the Jacobian in a pass of its own
        return y, permuted, log_det


class Flow(nn.Module):
    def __init__(self, channels, n_blocks=4, clamp=3.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, channels, k, clamp) for k in range(n_blocks))

    def forward(self, x, p):
        total = 0
        for block in self.blocks:
            x, p, log_det = block(x, p)
            total = total + log_det
        return x, total


def make_optimizer(flow):
    return torch.optim.Adam(flow.parameters(), lr=5e-5, betas=(0.8, 0.8), eps=1e-4, weight_decay=1e-5)


def step(flow, optimizer, tokens):
    """One training step on tokens (B, 1 + N, C), float32 -> the loss."""
    z, log_det = flow(tokens[:, 0], tokens[:, 1:])
    loss = ((0.5 * z.square().sum(1) - log_det) / z.shape[1]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def fit(tokens, batch_size, device):
    """Train one class on tokens (n, 1 + N, C) for an epoch through a DataLoader -> the flow, H = C."""
    torch.manual_seed(0)
    flow = Flow(tokens.shape[2]).to(device)
    optimizer = make_optimizer(flow)
    for (batch,) in DataLoader(TensorDataset(tokens), batch_size, shuffle=True):
        step(flow, optimizer, batch.float().to(device))
    return flow
