"""Train an adapter on several tasks at once: python -m tinylora_mtl.train --method align"""

if __name__ == "__main__":
    from .run.cli import run_command
    from .run.training import command
    run_command(command)
