@echo off
rem Tries trchat out on this computer: one server and N people, each in a window of its own.
rem Use: run.bat          (asks how many people)
rem      run.bat 3        (asks nothing)
setlocal EnableExtensions DisableDelayedExpansion
title trchat

rem Later lines name trchat.py only, so that no path with spaces or & has to pass through "start".
pushd "%~dp0"
if not exist trchat.py goto no_script
set "PYTHONUTF8=1"

set "PY="
call :try py -3
if not defined PY call :try python
if not defined PY goto no_python

set "COUNT=%~1"
if defined COUNT goto check
set "COUNT=2"
set /p "COUNT=How many people should join, 1 to 20? [2] "

:check
rem Only the exact words 1 to 20 pass, so nothing odd can reach the lines below.
setlocal EnableDelayedExpansion
set "PEOPLE="
for /L %%i in (1,1,20) do if "!COUNT!"=="%%i" set "PEOPLE=%%i"
if not defined PEOPLE goto no_number

rem The first start fetches a package and makes keys: once, here, and not in every window.
call %PY% trchat.py id --profile server
if errorlevel 1 goto no_start

start "trchat server" cmd /k %PY% trchat.py server --host 127.0.0.1 --port 8089 --auth open --profile server
rem "timeout" refuses to run without a keyboard; ping waits two seconds everywhere.
ping -n 3 127.0.0.1 >nul
for /L %%i in (1,1,%PEOPLE%) do start "trchat person%%i" cmd /k %PY% trchat.py connect 127.0.0.1:8089 --trust-new --name person%%i --profile p%%i
echo One server and %PEOPLE% people are starting. Type BYE in a window to leave.
exit /b 0

:try
rem Running it tells a real Python from the "python" that only opens the Microsoft Store.
call %* --version >nul 2>nul
if not errorlevel 1 set "PY=%*"
exit /b 0

:no_script
echo run.bat must lie in the same folder as trchat.py, and that folder must be reachable.
goto failed
:no_python
echo Python is missing. Install Python 3.9 or newer from https://www.python.org/downloads/
echo with the box "Add python.exe to PATH" ticked, then start run.bat again.
goto failed
:no_number
echo The number of people must be from 1 to 20.
goto failed
:no_start
echo trchat could not start; the reason stands above.

:failed
rem A window opened by a double click would close before anybody can read this.
if "%~1"=="" pause
exit /b 1
