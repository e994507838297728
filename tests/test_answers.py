"""Grading: every rule of extraction and comparison, by a table."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

import eval as ev
from egrsd import ROOT
from support.evaluation import benchmarks
from support.evaluation.benchmarks import load_benchmark
from support.shared.grading import answers_match, grade_completions

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY = ["--preset", "tiny", "--limit", "8", "--K", "3"]


RIGHT = [  # (answer in the box, gold)
    (r"\text{12 months}", "12"),
    (r"\text{5 apples}", "5"),
    (r"\text{12 teeth}", "12"),
    (r"\text{2 booths}", "2"),
    ("5 N/m", r"5 \text{ N/m}"),
    (r"\text{5 J/s}", "5 J/s"),
    (r"\text{3 AM}", r"\text{3 am}"),
    (r"\textbf{(B)}\ f(A)", r"\text{(B)}"),
    (r"3 \text{ W}", r"3 \text{ J/s}"),
    (r"5 \text{ Pa}", r"5 \text{ N/m}^2"),
    ("E(t) = C e^{-t}", "E(t) = c e^{-t}"),
    ("T = t_0 + C", "T = t_0 + c"),
    (r"\textbf{(A) }12", r"\text{(A)}"),
    (r"\big(9, \tfrac72\big)", "(9, 3.5)"),
    ("x < 58", r"(-\infty,58)"),
    (r"x \geq 13", r"[13,\infty)"),
    ("-1<x\\le2", "(-1,2]"),
    ("6 > x > -21", "-21<x<6"),
    (r"46\degree", r"46^{\circ}"),
    (r"0.\overline{3}", r"\frac13"),
    (r"2.1\overline{36}", r"\frac{47}{22}"),
    ("2√3", r"2\sqrt{3}"),
    ("1½", "1.5"),
    (r"\varnothing", r"\emptyset"),
    (r"\sin 30^\circ", "0.5"),
    (r"\binom{62}{4}", r"\frac{62!}{58! 4!}"),
    ("52", "52_8"),
    (r"5\text{ cm}", "5"),
    (r"5 \text{ square feet}", r"5\mathrm{~ft}^2"),
    ("-5i+6", "6 - 5i"),
    (r"1+i\sqrt{3}", r"1+\sqrt{3} i"),
    (r"\frac{37m}{4}", r"\frac{37}{4} m"),
    ("t/m", r"\frac{1}{m} t"),
    (r"\frac{c}{\sqrt{2}}", r"\frac{1}{\sqrt{2}}c"),
    (r"m_p c^2 (\gamma^2-1)\sin^2\theta", r"m_{p} c^{2}\left(\gamma^{2}-1\right) \sin ^{2} \theta"),
    (
        r"\hbar\omega\left(v+\frac{1}{2}\right) - \frac{e^2 E_0^2}{2 m \omega^2}",
        r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}",
    ),
    (r"\frac{E_1+2E_2}{3}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"),
    (r"E_1 \text{ and } E_2", "E_{1},E_{2}"),
    (
        r"\frac{dM}{dt} = \frac{10^5 L_\odot M^6}{0.007 c^2 M_\odot^6}",
        r"\frac{dM}{dt}=\frac{10^{5} L_{\odot}}{0.007 c^{2} M_{\odot}^{6}} M^{6}",
    ),
    (r"\mathrm{SRMC} = \mathrm{MR}", "MR=SRMC"),
    ("y' + r y = r x(t)", r"y^{\prime}+r y-r x(t)=0"),
    (r"\frac{\lambda_{red}}{\sqrt{2}}", r"\lambda_{\text {red}} / \sqrt{2}"),
    (r"\arcsin\left(\frac{10}{13}\right)", "np.arcsin(10/13)"),
    (r"\sin^{-1}(10/13)", "np.arcsin(10/13)"),
    (r"-\frac13", "-1./3"),
    ("-1.5", "-3./2"),
    (r"4.5 \times 10^{33}", "4.5e33"),
    ("4.5 x 10^33", "4.5e33"),
    (r"45 \times 10^{32}", "4.5e33"),
    (r"4.5 \times 10^{33} \mathrm{~erg} / \mathrm{s}", "4.5e33"),
    ("4.5E+33", "4.5e33"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("10^{-8}", "1e-8"),
    (r"2.88\times 10^{-19} \text{ J}", "2.88e-19"),
    ("0.000849", "8.49e-4"),
    ("300,000,000", "3e8"),
    ("5300", "5.3e3"),
    (r"6.72\times10^{-5}", ".0000672"),
    (r"\frac{-1 \pm \sqrt{17}}{2}", r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}"),
    (
        r"\left\{\frac{-1+\sqrt{17}}{2},\frac{-1-\sqrt{17}}{2}\right\}",
        r"\frac{-1 \pm \sqrt{17}}{2}",
    ),
    (r"x=1+\sqrt{19}, x = 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"-2, 1\pm\sqrt5", r"\{1\pm\sqrt{5},-2\}"),
    (r"1\mp\sqrt{19}", r"1\pm\sqrt{19}"),
    ("[-2,7]", r"x \in [-2,7]"),
    ("10{,}080", "10080"),
    (r"10\,080", "10080"),
    ("32348", r"\$32,\!348"),
    (r"\$32,348.00", r"\$32,\!348"),
    (r"36 \text{ dollars}", r"\$36"),
    (r"864\ \text{in}^2", r"864 \mbox{ inches}^2"),
    ("5.4", r"5.4 \text{ cents}"),
    (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}"),
    ("90°", r"90^\circ"),
    ("52_{8}", "52_8"),
    ("(C)", r"\text{(C)}"),
    (r"\text{evelyn}", r"\text{Evelyn}"),
    ("x=5", "5"),
    ("2x-y+3=0", "y = 2x + 3"),
    ("10x-14y+22z+8=0", "5x - 7y + 11z + 4 = 0"),
    (r"\frac{9}{5}", r"1\frac{4}{5}"),
    ("137.5", r"137 \frac{1}{2}"),
    ("(6, 31, -1)", "(6,31,-1)"),
    (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\{7,5,3\}", "3, 5, 7"),
    (r"1 \text{ and } -2", "1,-2"),
    (
        r"\begin{bmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{bmatrix}",
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
    ),
    (r"50\%", "0.5"),
    (r"\frac{57}{160}", ".35625"),
    (r"3 \times 10^{-3}", "0.003"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"2^{26} \cdot 25!\cdot 13", r"2^{25} \cdot 26!"),
    (r"4\sqrt{37}+14", r"14+4\sqrt{37}"),
    ("ab+2a+5b+10", "(a+5)(b+2)"),
    (r"\frac{\cos x}{\sin x}", r"\cot x"),
    ("I(0) e^{-t/RC}", "I(0) e^{-\\frac{t}{R C}}\n"),
    (r"\sin^{-1}(1.3 \sin \theta_w)", r"\arcsin{1.3 \sin{\theta_w}}"),
    (r"-\frac{1}{2\sqrt{X}}", r"-\frac{1}{2} X^{-\frac{1}{2}}"),
    ("125 - 1.25P", "X_{d}=125-1.25 P"),
    (r"\ln(2)+\frac{i\pi}{3}", r"\ln 2 + i\pi / 3"),
    (r"\frac{4A e^{it}}{3(1+i)}", r"\frac{4 A}{3+3 i} e^{i t}"),
    (r"m\dot{v}+bv=f", r"m \frac{d v}{d t}+b v=f"),
    (r"300 \text{ km s}^{-1}", "300"),
    (r"3 \times 10^8 \, \frac{\text{m}}{\text{s}}", "3e8"),
    (r"10\,\mu\text{m}", "10"),
    (r"\frac14", r"25\%"),
    (r"\frac{1}{\sqrt{2}}", "np.sqrt(2)/2"),
    (r"\frac{\pi}{4}", "np.pi/4"),
    (r"\ln 2", "np.log(2)"),
    ("-1", "-1."),
    ("0.5", "1/2"),
    (r"9.28 \times 10^{2}", "928"),
    ("870000000", "8.7e8"),
    ("073", "73"),
    ("73", "073"),
    ("025", "25"),
    ("73.0", "73"),
    ("$73$", "73"),
    (r"\frac{146}{2}", "73"),
    ("m+n = 50+23 = 73", "73"),
    (r"60\%", "60"),
    ("60%", "60"),
    (r"60\,\%", "60"),
    (r"\text{60%}", "60"),
    (r"\text{60%}", r"\frac35"),
    (r"33.3\%", "33.3"),
    (r"\frac{100}{3}\%", r"\frac{100}{3}"),
    ("10 percent", "10"),
    (r"10 \text{ percent}", "10"),
    (r"10 \text{ percent}", r"10\%"),
    ("10 percent", "0.1"),
    ("60", r"60\%"),
    ("0.6", r"60\%"),
    ("60.0", "60 percent"),
    ("3 million", "3000000"),
    (r"\$3.5 \text{ million}", "3,500,000"),
    (r"3 \text{ million dollars}", "3 Million"),
    ("3 dozen eggs", "36"),
    ("12 hundred", "1200"),
    (r"2 \times 10^{9}", r"2\text{ billion}"),
    ("1 1/2", r"\frac32"),
    ("-1 1/2", "-1.5"),
    ("10 000", "10000"),
    ("1\N{THIN SPACE}234\N{THIN SPACE}567", "1234567"),
    (r"\frac 1 2", r"\frac12"),
    ("5 miles", r"5 \text{ mi}"),
    ("18 dollars", r"\$18"),
    ("5 days", "5"),
    ("5 cm^2", r"5 \text{ cm}^2"),
    (r"2gh", r"2hg"),
    (r"\text{June 20}", "June 20"),
    ("June 20", r"\text{June 20}"),
    ("(-∞, 3]", r"(-\infty,3]"),
    ("(-∞,-2)∪(3,∞)", r"(-\infty,-2)\cup(3,\infty)"),
    ("x² + 1", "x^2+1"),
    ("1.6 × 10⁻¹⁹", "1.6e-19"),
    (r"7 \pmod{12}", "7"),
    (r"x \equiv 7 \pmod{12}", "7"),
    ("7", r"7 \pmod{12}"),
    (r"0.\dot{3}", r"\frac13"),
    (r"2.1\dot{6}", r"\frac{13}{6}"),
    (r"\sum_{n=1}^{\infty} n", r"\infty"),
    (r"\frac Rr", r"\frac{R}{r}"),
    (r"\pi(R-r)(R+r)", r"\pi(R^2-r^2)"),
    ("2C+1", "2 c+1"),
    (r"\frac{2^{100}-1}{2^{100}}", r"1-\frac{1}{2^{100}}"),
    ("x_i + 1", "x_{i}+1"),
    (
        r"\begin{pmatrix} \frac12 & 1 \\[4pt] 2 & 3 \end{pmatrix}",
        r"\begin{pmatrix} 1/2 & 1 \\ 2 & 3 \end{pmatrix}",
    ),
    (r"\text{12 hours}", "12"),
    (r"\text{12 dollars}", "12"),
    (r"\text{12 hours}", r"12 \text{ hr}"),
    ("12 dollars per day", "12"),
    (r"\text{12 miles per hour}", "12 mph"),
    ("12 m/s", "12"),
    ("12 m/s", r"12 \mathrm{~m} / \mathrm{s}"),
    ("12 USD", r"\$12"),
    (r"10 \mathrm{~kg} \mathrm{~m} / \mathrm{s}^{2}", r"10 \text{ N}"),
    ("€12", "12"),
    ("£12", "12"),
    ("-£12", "-12"),
    ("= 12", "12"),
    (r"\text{Answer: } 12", "12"),
    ("–984", "-984"),
    ("－984", "-984"),
    ("90^o", r"90^\circ"),
    (r"\cos{60^\circ}", "0.5"),
    (r"\cos{60^{\circ}}", "0.5"),
    (r"90^{\,\circ}", r"90^\circ"),
    (r"I\dot\omega + 2B\omega = T", r"I \frac{d \omega}{d t}+2 B \omega=T"),
    (r"m \dot v + bv = f", r"m \frac{d v}{d t}+b v=f"),
    (r"\textbf{(C) }12", r"\text{(C)}"),
    (r"5 \text{ meters per second}", r"5 \text{ m/s}"),
]
WRONG = [
    ("2", "2h/g"),
    ("2h/g", "2"),
    ("4J/s", "4"),
    (r"\text{(A)}, \text{(B)}", r"\text{(A)}"),
    (r"\textbf{(A)} \text{ and } \textbf{(B)}", r"\text{(A)}"),
    (r"\text{5 hundredths}", "5"),
    (r"\text{5 twelfths}", "5"),
    (r"\text{3 PM}", r"\text{3 AM}"),
    (r"3 \text{ J}", r"3 \text{ J/s}"),
    (r"5 \text{ N}", r"5 \text{ N/m}"),
    (r"12 \text{ Pa}", r"12 \text{ N/m}"),
    (r"\text{2 squared}", "2"),
    (r"\text{3 pm}", r"\text{3 am}"),
    (r"\text{10 north}", r"\text{10 south}"),
    (r"3 \text{ m}", r"3 \text{ m/s}"),
    ("T + r - R", "t + R - r"),
    (r"\frac{62!}{4! 58!}", r"\frac{61!}{4! 57!}"),
    ("52_9", "52_8"),
    ("49_9", "49_8"),
    (r"5 \text{ cm}", r"5 \text{ km}"),
    (r"5 \text{ cm}^2", r"5 \text{ cm}^3"),
    (r"0.\overline{3}", "0.3"),
    ("x > 3", r"[3,\infty)"),
    ("6 > x > -21", "-21<x<7"),
    (r"\sin 30^\circ", r"\sin 30"),
    ("6+5i", "6 - 5i"),
    (r"\frac{37}{4}", r"\frac{37}{4} m"),
    (r"\frac{1}{m}", r"\frac{1}{m} t"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{1}{\sqrt{2}}c"),
    (r"m_p c^2 (\gamma^3-1)\sin^2\theta", r"m_{p} c^{2}\left(\gamma^{2}-1\right) \sin ^{2} \theta"),
    ("2/3", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"),
    ("E_1", "E_{1},E_{2}"),
    ("MR = LRMC", "MR=SRMC"),
    ("y + r y = r x(t)", r"y^{\prime}+r y-r x(t)=0"),
    (r"\arcsin(13/10)", "np.arcsin(10/13)"),
    (r"\frac13", "-1./3"),
    (r"4.5 \times 10^{32}", "4.5e33"),
    (r"4.5 \times 10^{-33}", "4.5e33"),
    ("4.5", "4.5e33"),
    (r"2 \times 10^{-8}", "1e-8"),
    ("0", "1e-8"),
    (r"2.88\times 10^{-18}", "2.88e-19"),
    (r"\frac{-1-\sqrt{17}}{2}", r"\frac{-1 \pm \sqrt{17}}{2}"),
    (r"\frac{1 \pm \sqrt{17}}{2}", r"\frac{-1 \pm \sqrt{17}}{2}"),
    (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"1\pm\sqrt5", r"\{1\pm\sqrt{5},-2\}"),
    ("(-2,7)", r"x \in [-2,7]"),
    ("10,081", "10080"),
    (r"\frac{\pi}{2}", r"90^\circ"),
    ("53_8", "52_8"),
    ("B", r"\text{(C)}"),
    (r"\text{Navin}", r"\text{Evelyn}"),
    ("y=5", "x=5"),
    ("y=2x-3", "y = 2x + 3"),
    ("5x-7y+11z-4=0", "5x - 7y + 11z + 4 = 0"),
    (r"\frac{137}{2}", r"137 \frac{1}{2}"),
    ("[3,4]", "(3,4]"),
    (r"(-\infty,2]\cup[3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    ("(31,6,-1)", "(6,31,-1)"),
    (r"(\frac{\pi}{2},3)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("3,5", "3, 5, 7"),
    (r"1.5\%", "0.15"),
    ("0.33", r"\frac{1}{3}"),
    (r"\frac34", r"\frac43"),
    (r"14-4\sqrt{37}", r"14+4\sqrt{37}"),
    ("ab+2a+5b", "(a+5)(b+2)"),
    (r"\frac{e^{at}+e^{-at}}{2a}", r"\frac{1}{2a}(\exp{a*t} - \exp{-a*t})"),
    ("I(0) e^{t/(RC)}", "I(0) e^{-\\frac{t}{R C}}\n"),
    ("I_0", "I(0)"),
    (r"\ln 2 - i\pi/3", r"\ln 2 + i\pi / 3"),
    (r"t + \frac{1}{2}\sin 2t", r"(t + \frac{1}{2} \sin{2t}) u(t)"),
    (r"\frac{dx}{dt} = a - kx", r"\frac{d x}{d t}=k x-a"),
    (r"x_{\odot} = 2 + \foo{3}, 2", "2"),
    (r"x = 3 \text{ or } 4", "3"),
    (r"3 \times 10^{8}\ \frac{\text{m}}{\text{s}}", "10"),
    ("0.999999", "1"),
    ("3.14", r"\pi"),
    (r"2\sqrt{3\pi}", "2*np.pi*np.sqrt(3)"),
    ("2", "2, 3"),
    (r"\{1,2,4\}", r"\{1,2,3\}"),
    ("(2,1)", "(1,2)"),
    ("[1,2)", "[1,2]"),
    ("984", "-984"),
    ("3e-9", "1e-8"),
    ("703", "073"),
    ("-73", "73"),
    (r"60\%", "61"),
    (r"60\%", "6"),
    ("6000", r"60\%"),
    ("5000", r"50\%"),
    (r"\frac{3}{5}", "60"),
    (r"50\%", r"5000\%"),
    (r"50\%, 20\%", "0.5, 20"),
    ("50 percent, 20 percent", "0.5, 20"),
    (r"\$60", r"60\%"),
    (r"60\%", r"60^\circ"),
    ("3 million", "3"),
    ("3 millions", "3"),
    (r"3 \text{ million}", "3"),
    ("3", "3 million"),
    ("3 million", "3 billion"),
    ("3 million", "3 dollars"),
    ("3 hundred thousand", "300"),
    ("3 dozen", "3"),
    ("12 hundred", "12"),
    ("1 1/2", "11/2"),
    ("2 34", "234"),
    ("2 3", "23"),
    ("10 00", "1000"),
    ("1 000 000", "1000"),
    ("5 miles", r"5 \text{ km}"),
    ("5 days", "5 weeks"),
    ("5 km", r"5 \text{ m}"),
    ("5 cm^2", "5 cm^3"),
    (r"\$5", r"5\text{ cents}"),
    ("5 cents", "$5"),
    (r"\text{June 20}", "June 21"),
    ("20", "June 20"),
    ("(-∞, 3)", r"(-\infty,3]"),
    ("x³ + 1", "x^2+1"),
    ("1.6 × 10⁻¹⁸", "1.6e-19"),
    (r"8 \pmod{12}", "7"),
    (r"7 \pmod{12}", r"7 \pmod{13}"),
    (r"0.\dot{3}", "0.3"),
    (r"\frac{0}{0}", "4.5e33"),
    (r"0.\dot{1}4\dot{2}", r"\frac{1}{9}"),
    ("1", r"\frac{R}{r}"),
    (r"\frac{r}{R}", r"\frac{R}{r}"),
    ("0", r"\pi(R^2-r^2)"),
    ("0", "R-r"),
    (r"1-\frac{1}{2^{99}}", r"1-\frac{1}{2^{100}}"),
    ("x_j + 1", "x_{i}+1"),
    (r"\begin{pmatrix}1\\[4pt]3\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\text{3 hours}", r"3 \text{ minutes}"),
    (r"\text{2 thirds}", "2"),
    ("12 dollars per day", "12 dollars per week"),
    ("12 t/s", "12"),
    ("€12", r"\$12"),
    ("= 13", "12"),
    ("3–5", "-2"),
    (r"\textbf{(B) }12", r"\text{(C)}"),
    (r"5 \text{ km/h}", r"5 \text{ m/s}"),
    (r"5 \text{ m}", r"5 \text{ m/s}"),
    (r"10 \text{ cm}", r"10 \text{ nm}"),
    (r"5 \text{ J}", r"5 \text{ kJ}"),
]
EXTRACTED = [  # (whole completion, gold, right, status)
    ("The answer is 42.", "42", False, "no_box"),
    ("", "42", False, "no_box"),
    (r"<think>\boxed{42}", "42", False, "unfinished"),
    (r"<think>so</think>\boxed{41}<think>wait, \boxed{42}", "42", False, "unfinished"),
    (r"<think>so</think>\boxed{42}<think>wait", "42", False, "unfinished"),
    (r"<think>\boxed{42}</think>The answer is 42.", "42", False, "no_box"),
    (r"<think>\boxed{41}</think>\boxed{42}", "42", True, "ok"),
    (r"<think>\boxed{42}</think>\boxed{41}", "42", False, "ok"),
    (r"reasoning \boxed{41}</think>\boxed{42}", "42", True, "ok"),
    (r"reasoning \boxed{42}</think>so 42", "42", False, "no_box"),
    (r"<think>a</think>\boxed{41}<think>b</think>\boxed{42}", "42", True, "ok"),
    (r"<think>a</think>\boxed{42}<think>b</think>done", "42", False, "no_box"),
    (r"\boxed{41} no, \boxed{42}", "42", True, "ok"),
    (r"\boxed{42} and then \boxed{}", "42", False, "no_box"),
    ("\\boxed{42} and then \\boxed{  \n }", "42", False, "no_box"),
    (r"\boxed{}", "42", False, "no_box"),
    (r"\boxed{} so \boxed{42}", "42", True, "ok"),
    (r"\boxed{42} and so \boxed{42", "42", False, "no_box"),
    (r"\boxed{42} and so \boxed{\frac{84}{2}", "42", False, "no_box"),
    (r"\boxed{42} and so \boxed", "42", False, "no_box"),
    (r"\boxed{42} and so \boxed{", "42", False, "no_box"),
    (r"\boxed {42}", "42", True, "ok"),
    ("\\boxed\n  {42}", "42", True, "ok"),
    (r"\boxed{\boxed{42}}", "42", True, "ok"),
    (r"\boxed{\text{Answer: }\boxed{42}}", "42", True, "ok"),
    (r"\boxed{\frac{84}{2}}", "42", True, "ok"),
    (r"\boxed{\frac{\frac{84}{1}}{\sqrt{4}}} and text } after", "42", True, "ok"),
    (r"\boxed{\{1,2\}}", r"\{2,1\}", True, "ok"),
    (r"\boxed{\left\{1,2\right\}} done {", r"\{1,2\}", True, "ok"),
    (r"\boxed{\{1,2}", r"\{1,2\}", False, "ok"),
    (r"\boxed{42\} x}", "42", False, "ok"),
    (
        r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        True,
        "ok",
    ),
    (r"\fbox{42}", "42", False, "no_box"),
    ("boxed{42}", "42", False, "no_box"),
    (r"\boxed{42} I put it into \boxed brackets.", "42", True, "ok"),
    (r"<think></think>\boxed{42}<|im_end|>", "42", True, "ok"),
    (r"\boxed{???}", "42", False, "ok"),
    (r"\boxed{\frac{1}{}}", "42", False, "ok"),
    (r"\boxed{\text{I do not know}}", "42", False, "ok"),
    (r"\boxed{42 \text{ or } 43}", "42", False, "ok"),
    (r"\boxed{41, 42, 43}", "42", False, "ok"),
]

LONG = [  # at and over 1,000 characters
    (r"\boxed{" + "+".join(["1"] * 500) + "}", "500", True, "ok"),
    (r"\boxed{" + " " * 998 + "42}", "42", True, "ok"),
    (r"\boxed{" + " " * 999 + "42}", "42", False, "no_box"),
    (r"\boxed{42} then \boxed{" + "x" * 1001 + "}", "42", False, "no_box"),
    (r"\boxed{" + "+".join(["1"] * 100_000) + "}", "5", False, "no_box"),
    (r"\boxed{" + "(" * 3000 + "2" + ")" * 3000 + "}", "5", False, "no_box"),
    (r"\boxed{" * 20_000, "5", False, "no_box"),
]
HOSTILE = [
    r"9^{9^{9^9}}",
    "(10^8)!",
    "(" * 400 + "2" + ")" * 400,
    r"\gcd(2^{4000000000},3)",
    r"\sum_{n=1}^{10^9} \frac{1}{n^2}",
]


@pytest.fixture(scope="module", autouse=True)
def one_grader_pool():
    """The pool needs a second to start; it lives as long as this process."""
    yield grade_completions([r"\boxed{1/2}"], ["0.5"])


def test_grading_table() -> None:
    cases = [
        (rf"so \boxed{{{a}}}.", gold, rows is RIGHT, "ok")
        for rows in (RIGHT, WRONG)
        for a, gold in rows
    ]
    cases += EXTRACTED + LONG
    assert len(cases) > 180
    grades = grade_completions([text for text, *_ in cases], [gold for _, gold, *_ in cases])
    wrong = [
        (case[0][:80], case[1:], grade)
        for case, grade in zip(cases, grades)
        if (grade.correct, grade.status) != case[2:]
    ]
    assert not wrong


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: answer[:12])
def test_hostile_answers_time_out(answer: str) -> None:
    began = time.monotonic()
    grade, after = grade_completions([rf"\boxed{{{answer}}}", r"\boxed{\frac{4}{2}}"], ["5", "2"])
    assert (grade.correct, grade.status) == (False, "timeout") and after.correct
    assert time.monotonic() - began < 8 + 5  # the hard limit, and the start of another worker


def gold_against_gold(row: tuple[str, str]) -> tuple[str, bool]:
    try:
        return row[0], answers_match(row[1], row[1])
    except TimeoutError:
        return row[0], False


def test_gold_against_gold_through_the_parser() -> None:
    """Every row of the six benchmarks: a gold equals itself, and not just as a string."""
    folder = Path(os.environ.get("EGRSD_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "minerva.jsonl").exists():
        pytest.skip(f"no benchmark files in {folder}; set EGRSD_DATA")
    rows = [
        (f"{name} {p['id']}", p["answer"])
        for name in ev.SIX.split(",")
        for p in load_benchmark(name, str(folder), 0)
    ]
    assert len(rows) == 30 + 30 + 30 + 500 + 272 + 1319
    with multiprocessing.get_context("spawn").Pool(
        2
    ) as pool:  # spawned: math-verify's alarms need a main thread each
        wrong = [
            name for name, right in pool.map(gold_against_gold, rows, chunksize=16) if not right
        ]
    assert not wrong


def test_paper_grader_fails_where_ours_does_not(tmp_path: Path) -> None:
    rows = [
        {"benchmark": "minerva", "text": rf"\boxed{{{answer}}}", "gold": "4.5e33", "finish": finish}
        for answer, finish in (
            (r"4.5 \times 10^{33}", "stop"),
            ("4.5e33", "stop"),
            ("4.5e33", "length"),
        )
    ]
    benchmarks.grade(rows, "ours")
    assert [row["graders"] for row in rows] == [
        {"ours": True, "paper": False},
        {"ours": True, "paper": True},
        {"ours": False, "paper": False},
    ]  # cut is wrong, whatever it says
    assert [row["correct"] for row in rows] == [True, True, False]
    benchmarks.grade(rows, "paper")
    assert [row["correct"] for row in rows] == [False, True, False]
