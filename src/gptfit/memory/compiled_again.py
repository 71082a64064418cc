"""What the lean backward shares with nothing else: the stream's gradient as products read it."""

from gptfit.memory.compiled_kernels import Block


class Again(Block):
    """One block after the other."""

    def low_gradient(self, dx: str, name: str, noise: list[str]) -> str:
        """The stream's gradient as the matrix products read it."""
        if not self.copies and not self.run.dropout:
            return dx
        low = self.rows(name, self.run.n_embd)
        self.add([low], [dx, *noise])
        return low
