"""What leaving a task out really does."""

import torch
from torch.nn.functional import cross_entropy


def effects(model, tasks, target, objective):
    """F(1) - F(1 - e_a) of each task (n,), where F is a target's loss after ``objective(x, y)``."""

    def retrain(kept):
        data = [torch.cat([tasks[i][c] for i in kept]) for c in range(2)]
        options = {"max_iter": 200, "tolerance_grad": 1e-12, "line_search_fn": "strong_wolfe"}
        optimizer = torch.optim.LBFGS(model.parameters(), **options)

        def closure():
            optimizer.zero_grad()
            loss = objective(*data)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        return float(cross_entropy(model(target[0]), target[1]).detach())

    every = range(len(tasks))
    without = [retrain([j for j in every if j != i]) for i in every]
    full = retrain(every)  # last, so that the model stays so
    return torch.tensor([full - score for score in without]).double()
