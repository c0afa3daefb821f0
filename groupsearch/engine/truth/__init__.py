"""The engine held to plain autograd on the user's own model: before the first private step, and now and then in it."""
