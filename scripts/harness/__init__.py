"""What benchmarks and experiments share: result files, processes, meters, tables, plots, shapes, the tiny chain's stages."""
