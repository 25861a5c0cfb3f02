"The loop of the notebook that accompanies *Toy Models of Superposition*: oracle and baseline."
import torch


def plain_loop(n, m, instances, steps, density, batch=1024, lr=1e-3, seed=0):
    "Train ReLU-output models of uniform importance; return W (instances, n, m) and b."
    torch.manual_seed(seed)
    W = torch.nn.Parameter(torch.stack([torch.nn.init.xavier_normal_(torch.empty(n, m))
                                        for _ in range(instances)]))
    b = torch.nn.Parameter(torch.zeros(instances, n))
    probability = torch.full((instances, 1), density)
    optimiser = torch.optim.AdamW([W, b], lr=lr)
    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        x = torch.where(torch.rand(batch, instances, n) <= probability,
                        torch.rand(batch, instances, n), torch.zeros(()))
        h = torch.einsum("bif,ifh->bih", x, W)
        out = torch.relu(torch.einsum("bih,ifh->bif", h, W) + b)
        loss = ((x.abs() - out)**2).mean((0, 2)).sum()
        loss.backward()
        optimiser.step()
    return W.detach(), b.detach()
