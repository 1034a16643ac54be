from prism_gguf.cli import main

main()
