"""The authors' own files of weights give what their own code gives."""

import json

import pytest

import api
import export
import main
from model import all_settings, find
from tests.test_export import assert_enlarges

# PSNR and, where it is known, SSIM on Set5 and on Set14 by the authors' code, float32, whole images.
EXPECTED = {
    ('IMDN', 2): ('IMDN_x2.pth', (37.996, 0.9605), (33.627, 0.9177)),
    ('IMDN', 3): ('IMDN_x3.pth', (34.360, 0.9270), (30.322, 0.8417)),
    ('IMDN', 4): ('IMDN_x4.pth', (32.210, 0.8948), (28.582, 0.7811)),
    ('PAN', 2): ('PANx2_DF2K.pth', (38.001,), (33.593,)),
    ('PAN', 3): ('PANx3_DF2K.pth', (34.400,), (30.355,)),
    ('PAN', 4): ('PANx4_DF2K.pth', (32.131,), (28.611,)),
    ('BSRN', 2): ('net_g_BSRN_x2.pth', (38.083,), (33.730,)),
    ('BSRN', 3): ('net_g_BSRN_x3.pth', (34.450,), ()),
    ('BSRN', 4): ('net_g_BSRN_x4.pth', (32.349,), (28.735,)),
}


@pytest.mark.slow
@pytest.mark.parametrize('name, scale', EXPECTED)
def test_scores_are_those_of_the_authors_code(shared, tmp_path, name, scale):
    file, *expected = EXPECTED[name, scale]
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'benchmark').symlink_to(shared / 'benchmark')
    weights = shared / 'reference' / 'official' / file
    line = ['--model', 'auto', '--scale', str(scale), '--pre_train', str(weights), '--test_only', '--cpu']
    where = ['--dir_data', str(tmp_path / 'data'), '--save_dir', str(tmp_path), '--save', 'run']
    assert main.main([*line, '--data_test', 'Set5+Set14', *where]) == 0
    found = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert (found['model'], found['scale'], found['settings']) == (name, scale, all_settings(find(name), scale))
    for data, scores in zip(('Set5', 'Set14'), expected, strict=True):
        for metric, score, tolerance in zip(('psnr', 'ssim'), scores, (0.001, 0.0001), strict=False):
            assert found['sets'][data][metric] == pytest.approx(score, abs=tolerance), (data, metric)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['IMDN', 'PAN', 'BSRN'])
def test_their_files_can_be_exported(shared, name):
    """PAN's give values of 1e21 for noise of full contrast, with which a file must not be checked."""
    model = api.load(shared / 'reference' / 'official' / EXPECTED[name, 4][0], 'cpu').model
    assert_enlarges('onnx', export.export(model, 'onnx', 16), model, 1, 27, 40)
