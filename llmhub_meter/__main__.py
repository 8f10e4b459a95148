from .cli import main

# The workers of `serve` import this module again, under another name.
if __name__ == "__main__":
    raise SystemExit(main())
