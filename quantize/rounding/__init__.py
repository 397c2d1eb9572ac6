"""How a matrix is rounded to a grid: nearest, HQQ, GPTQ."""
