"""A page in the browser: drop images, choose a network, compare before and after, download the results."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from error import UserError, report_error, run_program
from options.kinds import Parser, count, folder, natural
from options.table import ROOT
from system.start import tune_process

log = logging.getLogger('frugalsr')


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns the exit status: 0, or 2 for an error the user can fix."""
    argv = sys.argv[1:] if argv is None else argv
    tune_process()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        run(build_parser().parse_args(argv))
    except (UserError, OSError) as error:
        return report_error(error, '--debug' in argv)
    except KeyboardInterrupt:
        pass
    return 0


def build_parser() -> Parser:
    """The options."""
    parser = Parser(
        prog='app.py',
        description='Serve a page in the browser that enlarges images.',
    )
    parser.add_argument(
        '--host', metavar='NAME', default='127.0.0.1', help='address to listen on; 0.0.0.0: every one of this machine'
    )
    parser.add_argument('--port', metavar='N', type=natural, default=7860, help='0: one that is free')
    parser.add_argument('--max_upload', metavar='N', type=count, default=50, help='size of an image file, MB')
    parser.add_argument(
        '--max_pixels', metavar='N', type=count, default=100, help='pixels of an enlarged image, millions'
    )
    parser.add_argument(
        '--extend', metavar='FOLDER', type=folder, default=ROOT / 'models', help='weights to choose from'
    )
    parser.add_argument('--cpu', action='store_true', help='leave the GPU alone')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser


def run(args: Namespace) -> None:
    """Serve the page until a signal ends it; what visitors left is deleted then."""
    if not args.extend.is_dir():
        raise UserError(f'--extend {args.extend} is not a folder: give a folder of weights.')
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # it counts users of Gradio
    aside = TemporaryDirectory(prefix='frugalsr-', ignore_cleanup_errors=True)  # a network may still be at work
    with listen(args.host, args.port) as listener, aside as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        try:
            import uvicorn

            from checkpoint import start_screen
            from photo.choice import BICUBIC, list_weights
            from web.enlarging import enlarge
            from web.page import site
        except ModuleNotFoundError as error:
            raise UserError(
                f'{error.name} is missing in {sys.executable}: pip install -r requirements.txt "gradio>=6.31".'
            ) from error
        start_screen()
        work = partial(enlarge, max_pixels=args.max_pixels, cpu=args.cpu)
        app = site([*list_weights(args.extend), *BICUBIC], work, Path(folder), args.max_upload)
        config = uvicorn.Config(
            app, log_level='warning', access_log=False, server_header=False, ws='none', timeout_graceful_shutdown=1
        )
        log.info('The page is at %s (Ctrl-C ends it).', address(listener))
        uvicorn.Server(config).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f'--host {host} --port {port} cannot be listened on ({error}): give others.') from error


def address(listener: socket.socket) -> str:
    """Where a browser finds what listens there."""
    host, port = listener.getsockname()[:2]
    return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


if __name__ == '__main__':
    run_program(main)
