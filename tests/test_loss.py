import pytest
import torch

from error import UserError
from loss import Loss

SR = torch.tensor([1.0, 2.0, 3.0, 5.0]).view(1, 1, 2, 2)
HR = torch.tensor([1.0, 4.0, 2.0, 1.0]).view(1, 1, 2, 2)
L1 = (0 + 2 + 1 + 4) / 4
MSE = (0 + 4 + 1 + 16) / 4


@pytest.mark.parametrize(
    'text, expected',
    [
        ('1*L1', {'L1': L1}),
        ('L1', {'L1': L1}),
        ('MSE', {'MSE': MSE}),
        ('1*L1+0.5*MSE', {'L1': L1, 'MSE': 0.5 * MSE}),
        ('2.5*MSE + 1e-2*L1', {'MSE': 2.5 * MSE, 'L1': 0.01 * L1}),
    ],
)
def test_values_by_hand(text, expected):
    assert {name: term.item() for name, term in Loss(text)(SR, HR).items()} == pytest.approx(expected)


def test_gradient_is_that_of_the_sum():
    sr = SR.clone().requires_grad_()
    sum(Loss('2*L1+0.5*MSE')(sr, HR).values()).backward()
    expected = 2 * (SR - HR).sign() / 4 + 0.5 * 2 * (SR - HR) / 4
    torch.testing.assert_close(sr.grad, expected)


@pytest.mark.parametrize(
    'text, words',
    [
        ('1*VGG', r"unknown term '1\*VGG'"),
        ('', "unknown term ''"),
        ('1*L1+', "unknown term ''"),
        ('1*l1', r"unknown term '1\*l1'"),
        ('L1*1', r"unknown term 'L1\*1'"),
        ('0*L1', "weight '0' is not"),
        ('-1*L1', "weight '-1' is not"),
        ('nan*L1', "weight 'nan' is not"),
        ('inf*L1', "weight 'inf' is not"),
        ('*L1', "weight '' is not"),
        ('1*2*L1', r"weight '1\*2' is not"),
        ('1*L1+2*L1', 'L1 stands twice'),
    ],
)
def test_mistakes(text, words):
    with pytest.raises(UserError, match=words) as caught:
        Loss(text)
    assert f'--loss {text}' in str(caught.value)


def test_unknown_term_names_the_known():
    with pytest.raises(UserError, match='L1 or MSE'):
        Loss('1*SSIM')
